"""Optimizer state in 8 and 16 bits: the map, the rounding, and what training sees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mst_jax import low_precision
from mst_jax.low_precision import (
    Quantized,
    adamw_8bit,
    dequantize_blockwise,
    dynamic_map,
    low_precision_state,
    quantize_blockwise,
    stochastic_round,
)

SIGNS = pytest.mark.parametrize("signed", [True, False])
DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
KEYS = pytest.mark.parametrize("key", [None, jax.random.key(0)])
HALF_GAP = {True: 0.9 / 64 / 2, False: 0.9 / 128 / 2}  # of the widest between codes
quantize = jax.jit(quantize_blockwise, static_argnames=("block_size", "signed"))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def over_decades(seed, *shape, decades=9, signed=True):
    """Return numbers of any size up to 1, and 1 in every block."""
    exponent = jax.random.uniform(jax.random.key(seed), shape, maxval=decades)
    x = 10.0**-exponent * (jnp.sign(normal(seed + 1, *shape)) if signed else 1)
    return x.at[..., ::16].set(1.0)


def published_map(signed, max_exponent_bits=7, total_bits=8):
    """bitsandbytes' `create_dynamic_map`, step by step."""
    data = [0.0, 1.0]
    non_sign_bits = total_bits - 1
    assert non_sign_bits == max_exponent_bits  # its branch for more is left out
    for i in range(max_exponent_bits):
        bits = i + non_sign_bits - max_exponent_bits + (0 if signed else 1)
        boundaries = np.linspace(0.1, 1, 2**bits + 1)
        means = (boundaries[:-1] + boundaries[1:]) / 2
        data += list(10.0 ** (-(max_exponent_bits - 1) + i) * means)
        if signed:
            data += list(-(10.0 ** (-(max_exponent_bits - 1) + i)) * means)
    return np.sort(np.array(data))


@SIGNS
def test_map_is_the_published_one(signed):
    ours = dynamic_map(signed)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, published_map(signed), rtol=1e-7)


@SIGNS
def test_every_code_is_the_nearest(signed):
    values = dynamic_map(signed)
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    x = np.concatenate(
        [
            np.asarray(over_decades(0, 30_000, signed=signed)),
            *(np.nextafter(middles, np.float32(to)) for to in (-2, 2)),
            *(np.nextafter(values, np.float32(to)) for to in (-2, 2)),
            *(middles, values, np.array([0.0, -0.0, 1e-30, -1e-30], np.float32)),
        ]
    )
    x = x[np.abs(x) <= 1]
    q = quantize(jnp.array(x), block_size=len(x), signed=signed)
    assert q.scales.tolist() == [1.0]
    ours = np.abs(values[np.asarray(q.codes)].astype(np.float64) - x)
    distances = np.abs(values.astype(np.float64) - x[:, None].astype(np.float64))
    assert (ours == distances.min(1)).all()


@SIGNS
@pytest.mark.parametrize(
    "shape, block_size", [((3, 512), 256), ((3, 300), 256), ((2, 5, 7), 3), ((7,), 256)]
)
def test_round_trip(signed, shape, block_size):
    @jax.jit
    def round_trip(x):
        q = quantize_blockwise(x, block_size=block_size, signed=signed)
        back = dequantize_blockwise(q)
        return q, back, quantize_blockwise(back, block_size=block_size, signed=signed)

    x = normal(0, *shape) if signed else jnp.abs(normal(0, *shape))
    q, back, again = round_trip(x)
    x, error = np.asarray(x), np.abs(np.asarray(back) - np.asarray(x))
    starts = range(0, shape[-1], block_size)
    want = [np.abs(x[..., i : i + block_size]).max(-1) for i in starts]
    assert (q.codes.dtype, q.codes.shape) == (jnp.uint8, shape)
    assert q.scales.dtype == jnp.float32
    np.testing.assert_array_equal(q.scales, np.stack(want, -1))
    for n, i in enumerate(starts):
        largest = error[..., i : i + block_size].max(-1)
        assert (largest <= HALF_GAP[signed] * want[n] * (1 + 1e-5)).all()
    if not signed:  # the largest comes back exactly, so the scales do
        jax.tree.map(np.testing.assert_array_equal, again, q)


@SIGNS
@KEYS
def test_zeros_stay_and_what_is_not_finite_takes_its_block_with_it(signed, key):
    x = jnp.abs(normal(0, 5, 768)).at[3].set(0).at[4, :300].set(0)
    for row, value in enumerate([jnp.nan, jnp.inf, -jnp.inf]):
        x = x.at[row, 300].set(value)
    back = dequantize_blockwise(quantize(x, signed=signed, key=key), jnp.bfloat16)
    finite = np.isfinite(back).reshape(5, 3, 256)
    assert not finite[:3, 1].any()
    assert finite[:, [0, 2]].all() and finite[3:].all()
    assert (back[3] == 0).all() and (back[4, :300] == 0).all() and back[4, 300:].any()


def test_no_axis_and_no_block_size_raise():
    with pytest.raises(ValueError, match="axis"):
        quantize_blockwise(jnp.float32(1))
    with pytest.raises(ValueError, match="block_size=0"):
        quantize_blockwise(jnp.ones(3), block_size=0)


def assert_unbiased(rounded, x, low, high):
    """Every number is low or high, and their mean x, as far as chance allows."""
    rounded, x = np.asarray(rounded, np.float64), np.asarray(x, np.float64)
    n, gap = len(rounded), (high - low).astype(np.float64)
    assert ((rounded == low) | (rounded == high)).all()
    chance = (x - low) / gap
    bound = 5 * np.sqrt(chance * (1 - chance) / n) + 6 / n
    assert (np.abs(rounded.mean(0) - x) <= bound * gap).all()


@SIGNS
def test_stochastic_rounding_is_unbiased(signed):
    values = dynamic_map(signed)
    x = over_decades(0, 512, decades=7, signed=signed)
    x = jnp.maximum(x, values[0])  # the signed map has no -1

    def there_and_back(key):
        return dequantize_blockwise(quantize_blockwise(x, signed=signed, key=key))

    rounded = jax.jit(jax.vmap(there_and_back))(
        jax.random.split(jax.random.key(1), 999)
    )
    above = np.clip(np.searchsorted(values, x), 1, 255)
    assert_unbiased(rounded, x, values[above - 1], values[above])


def test_bfloat16_rounding_is_unbiased_and_keeps_what_is_exact():
    x, keys = normal(0, 512), jax.random.split(jax.random.key(1), 999)
    rounded = jax.jit(jax.vmap(stochastic_round, (None, 0)))(x, keys)
    low = (np.asarray(x).view(np.uint32) & 0xFFFF0000).astype(np.uint32)
    high = (low + 0x10000).astype(np.uint32).view(np.float32)  # away from zero
    low = low.view(np.float32)
    assert_unbiased(rounded, x, np.minimum(low, high), np.maximum(low, high))
    exact = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan], np.float32)
    kept = stochastic_round(jnp.array(exact), keys[0])
    np.testing.assert_array_equal(np.asarray(kept, np.float32), exact)


@pytest.mark.parametrize("cut", [0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1])
def test_bfloat16_rounding_has_exactly_the_chance_of_what_is_cut(monkeypatch, cut):
    # Of 2**16 noises `cut` round away from zero: every number of 2**-102 to 2**100.
    tops = np.arange(2**16, dtype=np.uint32)
    exponents = tops >> 7 & 0xFF
    tops = tops[(exponents > 24) & (exponents < 227)]
    x = jnp.asarray((tops << 16 | cut).view(np.float32))
    edges = {0, cut - 1, cut, 2**16 - cut - 1, 2**16 - cut, 2**16 - 1}
    for noise in edges & {*range(2**16)}:
        monkeypatch.setattr(
            low_precision, "_random_bits",
            lambda key, shape, noise=noise: jnp.full(shape, noise, jnp.uint16),
        )  # fmt: skip
        rounded = stochastic_round(x, jax.random.key(0))
        above = np.where(x > 0, noise >= 2**16 - cut, noise < cut)
        np.testing.assert_array_equal(np.asarray(rounded).view(np.uint16), tops + above)


def test_noise_differs_between_elements_rows_and_keys():
    halfway = jnp.full((64, 1024), 1 + 2.0**-8)
    keys = jax.random.split(jax.random.key(0), 8)
    up = jax.jit(jax.vmap(stochastic_round, (None, 0)))(halfway, keys) > 1
    coins = 2.0 * np.asarray(up) - 1
    assert abs(coins.mean()) < 5 / np.sqrt(coins.size)
    bound = 5 / np.sqrt(coins[0].size)
    assert abs((coins[:, :, 1:] * coins[:, :, :-1]).mean()) < bound
    assert abs((coins[:, 1:] * coins[:, :-1]).mean()) < bound
    for other in coins[1:]:
        assert abs((coins[0] * other).mean()) < bound
        assert abs((coins[0, :, 1:] * other[:, :-1]).mean()) < bound


def test_works_under_jax_transformations():
    x = normal(0, 4, 3, 300)
    want = quantize(x)
    mapped = jax.jit(jax.vmap(quantize_blockwise))(x)
    scanned = jax.lax.scan(lambda c, row: (c, quantize_blockwise(row)), 0, x)[1]
    for q in (mapped, scanned):
        jax.tree.map(np.testing.assert_array_equal, q, want)
    shapes = jax.eval_shape(quantize_blockwise, x)
    assert isinstance(shapes, Quantized) and shapes.signed
    assert shapes.codes.shape == x.shape and shapes.scales.shape == (4, 3, 2)


def train(optimizer, steps=200):
    """Regress on a teacher, with inputs over two decades; return loss and state."""
    teacher = normal(1, 64, 64) / 4, normal(2, 64, 64) / 8
    params = normal(3, 64, 64) / 8, normal(4, 64, 64) / 8, jnp.ones(64)

    def loss(params, x):
        wanted = jnp.tanh(x @ teacher[0]) @ teacher[1]
        output = jnp.tanh(x @ params[0]) @ params[1] * params[2]
        return ((output - wanted) ** 2).mean()

    def step(carry, x):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
        return (optax.apply_updates(params, updates), state), None

    inputs = normal(5, steps + 16, 32, 64) * jnp.logspace(0, -2, 64)
    carry = params, jax.jit(optimizer.init)(params)
    (params, state), _ = jax.lax.scan(step, carry, inputs[16:])
    return float(loss(params, inputs[:16])), state


@pytest.mark.parametrize(
    "inner", [optax.adamw(3e-3), optax.lion(1e-3)], ids=["adamw", "lion"]
)
def test_training_is_that_of_f32_state(inner):
    untrained, _ = train(inner, steps=0)
    wanted, _ = train(inner)
    assert wanted < 0.3 * untrained
    for dtype in ("bfloat16", "int8"):
        loss, state = train(low_precision_state(inner, dtype))
        large = [x for x in jax.tree.leaves(state) if x.size >= 4096]
        assert max(x.dtype.itemsize for x in large) < 4
        assert abs(loss / wanted - 1) < 0.02, (dtype, loss, wanted)  # lion: 1.02 %


def as_bfloat16(x):
    return jax.lax.reduce_precision(x, 8, 7)  # XLA drops casts there and back on a GPU


def as_nearest_code(x, signed=False):
    return dequantize_blockwise(quantize_blockwise(x, signed=signed))


@pytest.mark.parametrize(
    "to_nearest, dtype", [(as_bfloat16, "bfloat16"), (as_nearest_code, "int8")]
)
def test_second_moment_follows_the_gradients(to_nearest, dtype):
    """b2 = 0.999, and every other gradient shrinks tenfold.

    Rounded to nearest, no number moves by a thousandth of itself.
    """
    rms: Any = optax.scale_by_rms(decay=0.999, eps=0.0)

    def last_updates(optimizer: Any):
        def step(state, i):
            size = jnp.where((i > 300) & (jnp.arange(256) % 2 == 0), 0.1, 1.0)
            gradients = jax.random.normal(jax.random.key(i), (4, 256)) * size
            return optimizer.update(gradients, state)[1], None

        state = jax.jit(optimizer.init)(jnp.zeros((4, 256)))
        state, _ = jax.lax.scan(step, state, jnp.arange(4000))
        return optimizer.update(jnp.ones((4, 256)), state)[0]

    def update(updates, state, params=None):
        updates, state = rms.update(updates, state, params)
        return updates, jax.tree.map(to_nearest, state)

    wanted = last_updates(rms)
    ours = last_updates(low_precision_state(rms, dtype, min_size=0)) / wanted
    assert abs(float(jnp.median(ours)) - 1) < 0.02
    assert float(jnp.abs(jnp.log(ours)).max()) < 0.5
    nearest = last_updates(optax.GradientTransformation(rms.init, update)) / wanted
    assert float(jnp.abs(jnp.log(nearest)).mean()) > 0.3


def largest_update(optimizer):
    """Of gradients from 1e-12 to 1 in each block, which are zero every other step."""
    size = over_decades(0, 16, 256, decades=12)

    def step(state, i):
        updates, state = optimizer.update(size * (i % 2), state, jnp.zeros_like(size))
        return state, jnp.abs(updates).max()

    state = jax.jit(optimizer.init)(size)
    return float(jax.lax.scan(step, state, jnp.arange(1, 41))[1].max())


def test_small_second_moments_do_not_make_large_updates():
    """Where nu is less than half its block's smallest code, but mu is not.

    f32's updates stay below 1. Rounding doubles or halves numbers of a millionth of
    their block's largest, and no more, since sqrt(nu) is kept from zero.
    """
    adam: Any = optax.adamw(1.0, b2=0.999, eps=1e-12, weight_decay=0.0)
    assert largest_update(adam) < 1.1
    for dtype in ("bfloat16", "int8"):
        assert largest_update(low_precision_state(adam, dtype)) < 10

    def without_the_root(updates, state, params=None):
        updates, state = adam.update(updates, state, params)
        mu, nu = as_nearest_code(state[0].mu, True), as_nearest_code(state[0].nu)
        return updates, (state[0]._replace(mu=mu, nu=nu), *state[1:])

    assert (
        largest_update(optax.GradientTransformation(adam.init, without_the_root)) > 1e4
    )


def test_bytes_of_the_state():
    shapes = {"w": (128, 1024), "b": (2, 512, 256)}
    params = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in shapes.items()}

    def bytes_a_parameter(optimizer):
        state = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
        size = sum(p.size for p in params.values())
        return sum(x.size * x.dtype.itemsize for x in state if x.ndim) / size

    assert bytes_a_parameter(adamw_8bit(1e-3)) == 2 * (1 + 4 / 256)
    assert bytes_a_parameter(adamw_8bit(1e-3, block_size=128)) == 2 * (1 + 4 / 128)
    bf16 = low_precision_state(optax.adamw(1e-3), "bfloat16")
    assert bytes_a_parameter(bf16) == 2 * 2


@DTYPES
def test_what_stays_as_it_is(dtype):
    shapes = {"w": (64, 64), "small": (63, 65), "norm": (5000,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    optimizer: Any = low_precision_state(optax.adamw(1e-3), dtype)
    adam = jax.eval_shape(optimizer.init, params).inner[0]
    assert adam.count.dtype == jnp.int32
    for name in ("small", "norm"):
        assert adam.mu[name].dtype == adam.nu[name].dtype == jnp.float32
    if dtype == "int8":
        assert adam.mu["w"].signed and not adam.nu["w"].signed
    else:
        assert adam.mu["w"].dtype == adam.nu["w"].dtype == jnp.bfloat16

    large = {"w": jnp.ones((256, 512))}  # factored: rows and columns
    adafactor = optax.scale_by_factored_rms()
    state: Any = low_precision_state(adafactor, dtype).init(large)
    jax.tree.map(np.testing.assert_array_equal, state.inner, adafactor.init(large))


def test_one_parameter_without_a_tree_and_masked_ones():
    optimizer: Any = adamw_8bit(1e-3)
    state: Any = jax.eval_shape(optimizer.init, jnp.ones((64, 64)))
    assert isinstance(state.inner[0].mu, Quantized)
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    masked = optax.masked(optax.adamw(1e-3), {"a": True, "b": False})
    optimizer = low_precision_state(masked, "int8")
    state = optimizer.init(params)
    assert isinstance(state.inner.inner_state[0].nu["a"], Quantized)
    updates, new = jax.jit(optimizer.update)(params, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert (updates["b"] == params["b"]).all() and (updates["a"] < 0).all()


def test_a_moment_of_unknown_sign_raises():
    params = {"w": jnp.ones((64, 64))}  # too small to be factored
    rms = optax.scale_by_factored_rms()
    with pytest.raises(ValueError, match=r"\.v\['w'\].*second_moments"):
        low_precision_state(rms, "int8").init(params)
    named: Any = low_precision_state(rms, "int8", second_moments=("v",))
    assert not jax.eval_shape(named.init, params).inner.v["w"].signed


@DTYPES
def test_a_gradient_that_is_not_finite_stays_visible(dtype):
    optimizer: Any = low_precision_state(optax.adamw(1e-3), dtype)
    update, init = jax.jit(optimizer.update), jax.jit(optimizer.init)
    params, gradients = jnp.ones((16, 512)), normal(0, 16, 512)
    for value in (jnp.nan, jnp.inf):
        bad = gradients.at[3, 5].set(value)
        _, state = update(bad, init(params), params)
        updates, _ = update(gradients, state, params)
        assert not np.isfinite(updates[3, 5])
        assert np.isfinite(updates[:3]).all() and np.isfinite(updates[3, 256:]).all()


def test_bfloat16_parameters_and_gradients_update_in_f32():
    params = jnp.ones((63, 64), jnp.bfloat16)
    optimizer: Any = adamw_8bit(1e-3)
    state = jax.eval_shape(optimizer.init, params)
    updates, new = jax.eval_shape(optimizer.update, params, state, params)
    assert updates.dtype == new.inner[0].mu.dtype == jnp.float32
    assert new == state


@DTYPES
def test_a_stack_is_updated_in_place_layer_by_layer(dtype):
    """The state [L, ...] is carried through a loop, and donated."""
    optimizer: Any = low_precision_state(optax.adamw(1e-2), dtype)
    params = {"w": normal(0, 3, 64, 300), "norm": jnp.ones((3, 64))}
    gradients = jax.tree.map(lambda p: normal(1, *p.shape), params)

    def at(tree, i):
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree
        )

    def one_layer(i, carry):
        params, state = at(carry, i)
        new = optimizer.update(at(gradients, i), state, params)
        return jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), carry, new
        )

    state = jax.jit(jax.vmap(optimizer.init))(params)
    assert state.inner[0].nu["norm"].dtype == jnp.float32
    wanted = jax.jit(jax.vmap(optimizer.update))(gradients, state, params)
    old = jax.tree.map(jnp.copy, (params, state))
    loop = jax.jit(
        lambda carry: jax.lax.fori_loop(0, 3, one_layer, carry), donate_argnums=0
    )
    new = loop(old)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert_same(new, wanted)


def assert_same(a, b):
    """Equal, but for a number on the verge of the next: XLA's own rounding differs."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert (np.abs(x - y) > 1e-5 * np.abs(y)).mean() < 1e-3


def test_codes_take_the_sharding_of_the_parameter():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    optimizer: Any = adamw_8bit(1e-3)
    params, gradients = normal(0, 64, 2048), normal(1, 64, 2048)
    arguments = gradients, jax.jit(optimizer.init)(params), params
    wanted = jax.jit(optimizer.update)(*arguments)
    arguments = jax.tree.map(
        lambda x: jax.device_put(x, sharding) if x.ndim else x, arguments
    )
    got = jax.jit(optimizer.update)(*arguments)
    for x in jax.tree.leaves(got):
        assert not x.ndim or x.sharding.is_equivalent_to(sharding, 2)
    assert_same(got, wanted)


def test_state_goes_through_a_checkpoint(tmp_path):
    optimizer: Any = adamw_8bit(1e-3)
    params = {"w": normal(0, 64, 300)}
    state = jax.jit(optimizer.init)(params)
    _, state = jax.jit(optimizer.update)(params, state, params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(optimizer.init, params)
        restored = checkpointer.restore(tmp_path / "state", shapes)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_noise_differs_between_leaves(dtype):
    optimizer = low_precision_state(optax.adamw(1e-3), dtype)
    params = {name: jax.random.normal(jax.random.key(0), (64, 256)) for name in "ab"}
    _, state = optimizer.update(params, optimizer.init(params), params)
    mu = state.inner[0].mu
    codes = [mu[n].codes if dtype == "int8" else mu[n] for n in "ab"]
    assert (codes[0] != codes[1]).mean() > 0.1
