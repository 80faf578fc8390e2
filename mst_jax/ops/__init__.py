"""Pure functions of arrays, one signature whatever computes them."""
