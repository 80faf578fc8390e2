"""The compile cache: where it lies, what it holds, that a second run uses it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mst_jax.compile_cache import compile_cache
from mst_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from mst_jax.trainer import train

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def no_directory(tmp_path, monkeypatch):
    """As in a shell that has set nothing, but for the home and the shortest time."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    yield tmp_path / "xdg"
    for name, value in before.items():
        jax.config.update(name, value)


def compiled(size):
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((size, size))))


def test_a_program_is_compiled_once(no_directory):
    with compile_cache("auto") as cache:
        first = compiled(11)
        assert cache.directory is not None and no_directory in cache.directory.parents
        files = sorted(cache.directory.glob("*-cache"))
        assert cache.misses == len(files) > 0 == cache.hits
        assert f"{len(files)} there" in str(cache)
    with compile_cache("auto") as again:
        assert compiled(11) == first
        assert (again.hits, again.misses) == (len(files), 0)
        compiled(12)
        assert again.misses > 0
    assert jax.config.jax_compilation_cache_dir is None


def test_nothing_is_counted_or_kept_outside(no_directory):
    with compile_cache("auto") as cache:
        pass
    compiled(13)
    assert cache.hits == cache.misses == 0 and cache.directory is not None
    assert not [*cache.directory.glob("*-cache")]


def test_jax_s_own_directory_is_respected(tmp_path, no_directory):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with compile_cache("auto") as cache:
        compiled(14)
        assert cache.directory == str(tmp_path / "own")
        assert [*(tmp_path / "own").glob("*-cache")]
    assert "JAX_COMPILATION_CACHE_DIR" in str(cache)
    assert not no_directory.exists()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_jax_s_own_directory_may_be_a_url(no_directory):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    with compile_cache("auto") as cache:
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/cache"
        assert "kept in gs://bucket/cache (JAX_COMPILATION" in str(cache)


def test_a_named_directory_wins(tmp_path, no_directory):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with compile_cache(str(tmp_path / "named")) as cache:
        compiled(15)
    assert [*(tmp_path / "named").glob("*-cache")] and not (tmp_path / "own").exists()
    assert cache.directory == tmp_path / "named"


def test_off_keeps_nothing(tmp_path, no_directory):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with compile_cache("off") as cache:
        compiled(16)
    assert cache.directory is None and "not kept" in str(cache)
    assert not (tmp_path / "own").exists()
    assert jax.config.jax_enable_compilation_cache


def test_jax_s_own_switch_is_respected(no_directory):
    jax.config.update("jax_enable_compilation_cache", False)
    with compile_cache("auto") as cache:
        compiled(17)
    assert cache.directory is None and "JAX_ENABLE_COMPILATION_CACHE" in str(cache)
    assert not jax.config.jax_enable_compilation_cache


def test_a_directory_that_cannot_be_made(tmp_path, no_directory):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"Config.compile_cache='.*file/x': .*file"):
        with compile_cache(str(tmp_path / "file" / "x")):
            raise AssertionError("not reached")
    no_directory.write_text("in the way")
    with compile_cache("auto") as cache:  # a home one cannot write to is no error
        assert compiled(18)
    assert cache.directory is None and "xdg" in cache.why


def test_an_error_inside_restores_jax_s_options(no_directory):
    with pytest.raises(ZeroDivisionError), compile_cache("auto"):
        raise ZeroDivisionError
    assert jax.config.jax_compilation_cache_dir is None


def test_the_same_run_again_compiles_nothing(tmp_path, no_directory, capsys):
    (tmp_path / "text.txt").write_text("one two three four five six seven " * 400)
    cfg = Config(
        model=ModelConfig(
            hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2,
            num_kv_heads=1,
        ),
        out_dir=str(tmp_path / "first"),
        data=DataConfig(source=str(tmp_path / "text.txt"), seq_len=32, batch_size=2),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=2, eval_batches=1, save_every=0, mlp_chunk_size=16),
    )  # fmt: skip
    events = []

    def listen(event, **_):
        events.append(event.rpartition("/")[2])

    jax.monitoring.register_event_listener(listen)
    try:
        first = train(cfg)
        assert "cache_misses" in events
        assert "compiled in" in capsys.readouterr().out
        jax.clear_caches()
        events.clear()
        second = train(dataclasses.replace(cfg, out_dir=str(tmp_path / "second")))
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert "cache_hits" in events and "cache_misses" not in events
    printed = capsys.readouterr().out
    assert "read the compiled step in" in printed and "compiled in" not in printed
    np.testing.assert_array_equal(second["loss"], first["loss"])
