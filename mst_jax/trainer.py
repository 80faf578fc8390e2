"""The run: configuration -> data, weights, step -> metrics, checkpoints, a last line.

Everything that can be refused is refused before anything is compiled. A run that is
interrupted saves first; the same command again resumes from the newest whole checkpoint
and, on a CPU, ends bit for bit where an uninterrupted run would have.
"""

import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mst_jax import hf
from mst_jax.checkpoint import Checkpoints
from mst_jax.compile_cache import CompileCache, compile_cache
from mst_jax.config import Config, ModelConfig, from_dict, to_dict
from mst_jax.data import load_data
from mst_jax.description import describe, implementations
from mst_jax.gradients import make_plan
from mst_jax.hf_config import model_config_from_hf
from mst_jax.memory import explained, fit
from mst_jax.metrics import (
    Meter,
    MetricsWriter,
    peak_memory_bytes,
    plot_loss,
    profiled,
    read_metrics,
)
from mst_jax.model import init_params
from mst_jax.optim import check_frozen
from mst_jax.sharding import check_divisible, make_mesh, named, param_specs
from mst_jax.train_step import (
    BATCH_SPEC,
    abstract_state,
    init_train_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)

logger = logging.getLogger("mst_jax")


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became infinite or NaN."""


def train(cfg: Config) -> dict[str, Any]:
    """Run, or resume, the training that `cfg` describes.

    Returns:
        A summary: `step`, `loss`, `eval_loss`, `tokens_per_second` (median),
        `peak_memory_bytes`, `checkpoint`, `interrupted`; from an HF checkpoint also
        `load_bytes` and `load_seconds`.

    Raises:
        ValueError, FileNotFoundError: a config, data or checkpoint that cannot work.
        NonFiniteLossError: names the step and the last good checkpoint.
        OutOfMemoryError: says what was predicted and what would fit.
    """
    console = Console()
    run = _Run(cfg, console)
    choice = run.cfg.compile_cache
    with compile_cache(choice) as cache, alone(run.out), run.checkpoints:
        return run.loop(cache)


class _Run:
    def __init__(self, cfg: Config, console: Console):
        self.cfg, self.console = cfg, console
        self.loaded: dict[str, Any] = {}
        self.out = Path(cfg.out_dir).expanduser()
        check_writable(self.out)
        self.source = hf.resolve(cfg.init_from) if cfg.init_from else None
        model = model_config_from_hf(self.source) if self.source else cfg.model
        assert model is not None  # Config makes sure of it
        self.model: ModelConfig = model
        cfg = self.cfg = fit(cfg, model)
        check_divisible(self.model, cfg.mesh)
        check_frozen(hf.param_shapes(self.model), cfg.optim.freeze)
        make_plan(cfg, self.model)  # refused before any data is read
        implementations(cfg, self.model)
        self.mesh = make_mesh(cfg.mesh)
        self.checkpoints = Checkpoints(self.out / "checkpoints", keep=cfg.train.keep)
        self._check_same_run()
        if self.source and self.checkpoints.latest() is None:
            hf.check_weights(self.source, self.model)
        data = replace(cfg.data, tokenizer=cfg.tokenizer)
        self.data = load_data(data, self.model.vocab_size)
        self._check_same_data()
        self.iterator = self.data.train_iterator()
        self.batch_sharding = NamedSharding(self.mesh, BATCH_SPEC)
        self.meter = Meter(self.model, self.mesh.size)

    def _check_same_run(self) -> None:
        """Refuse to resume a run of another model, data or optimizer."""
        if self.checkpoints.latest() is None:
            return
        way_out = "use another --out-dir, or remove it to start again"
        extra = self.checkpoints.extra()
        try:
            before = _identity(from_dict(extra.get("config", {})))
        except ValueError as error:
            raise ValueError(
                f"{self.out} holds a run of another version of this package ({error}); "
                + way_out
            ) from error
        now = _identity(self.cfg)
        different = [
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if different:
            raise ValueError(
                f"{self.out} holds a run with other settings: {'; '.join(different)}; "
                + way_out
            )

    def _check_same_data(self) -> None:
        """Refuse to go on in other data: the position in it would mean another."""
        if self.checkpoints.latest() is None:
            return
        before = self.checkpoints.extra().get("num_tokens", self.data.num_tokens)
        if before != self.data.num_tokens:
            raise ValueError(
                f"{self.out} holds a run on {before} training tokens of "
                f"{self.cfg.data.source!r}, which now has {self.data.num_tokens}: "
                "restore the files as they were, or use another --out-dir"
            )

    # --- state ---

    def initial_state(self) -> tuple[int, Any]:
        """Return (step, state): resumed, from the HF checkpoint, or fresh."""
        abstract = abstract_state(self.cfg, self.model)
        on_host = self.cfg.optim.state_on_host
        shardings = state_shardings(abstract, self.mesh, on_host=on_host)
        abstract = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            shardings,
        )
        restored = self.checkpoints.restore(abstract)
        if restored is not None:
            step, state, extra = restored
            self.iterator.set_state(extra["data"])
            self.console.print(f"resumed from step {step} of {self.out}")
            return step, state
        start = partial(init_train_state, self.cfg, mesh=self.mesh)
        if self.source is None:
            seed = self.cfg.train.seed
            return 0, jax.jit(lambda: start(init_params(self.model, seed)))()
        began = time.perf_counter()
        params = hf.load_params(
            self.source,
            self.model,
            dtype=self.cfg.optim.param_dtype,
            shardings=named(self.mesh, param_specs(abstract["params"])),
        )
        jax.block_until_ready(params)
        seconds = time.perf_counter() - began
        size = sum(p.nbytes for p in jax.tree.leaves(params)) / 2**30
        self.console.print(
            f"read {size:.2f} GiB of weights in {seconds:.1f} s", highlight=False
        )
        self.loaded = {"load_seconds": seconds, "load_bytes": int(size * 2**30)}
        return 0, jax.jit(start, donate_argnums=0)(params)

    def save(self, step: int, state: Any) -> None:
        source = str(self.source.absolute()) if self.source else None
        extra = {
            "data": self.iterator.get_state(),
            "config": to_dict(self.cfg),
            "model": to_dict(self.model),
            "source": source,
            "num_tokens": self.data.num_tokens,
        }
        self.checkpoints.save(step, state, extra)

    # --- data ---

    def next_batch(self) -> dict[str, jax.Array]:
        micro = [next(self.iterator) for _ in range(self.cfg.train.accumulate)]
        for batch in micro:
            self.meter.add(batch)
        return self._put({k: np.stack([m[k] for m in micro]) for k in micro[0]})

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        if not self.cfg.data.packing:
            # One document a row: causal attention needs no segments, and positions
            # count from 0 anyway. Leaving them out lets cuDNN run.
            batch = {k: batch[k] for k in ("tokens", "labels")}
        return jax.device_put(batch, self.batch_sharding)

    def evaluate(self, eval_step: Any, params: Any) -> float | None:
        totals = [
            eval_step(params, self._put({k: v[None] for k, v in batch.items()}))
            for batch in self.data.eval_batches(self.cfg.train.eval_batches)
        ]
        count = sum(float(c) for _, c in totals)
        return sum(float(t) for t, _ in totals) / count if count else None

    # --- the loop ---

    def loop(self, cache: CompileCache) -> dict[str, Any]:
        cfg, out = self.cfg, self.out
        start, state = self.initial_state()
        if start >= cfg.train.steps:
            self.console.print(f"{out} already has all {cfg.train.steps} steps")
            if (done := _summary(out)).get("step") == start:
                self._last_words(done)
                return done
        (out / "config.json").write_text(json.dumps(to_dict(cfg), indent=2))
        step_fn = make_train_step(cfg, self.model, self.mesh)
        eval_fn = make_eval_step(cfg, self.model, self.mesh)
        for line in describe(cfg, self.model, self.data, cache):
            self.console.print(line, highlight=False, soft_wrap=True)
        if start < cfg.train.steps:
            with explained(cfg, self.model):
                step_fn = self._compile(step_fn, state, cache)
        writer = MetricsWriter(out, start_step=start)
        summary: dict[str, Any] = {"step": start, "interrupted": False, **self.loaded}
        rates: list[float] = []
        step = saved = logged = start
        # After the first steps, which fill caches and queues, if there are more.
        traced = min(start + 2, cfg.train.steps - 1)
        metrics: dict[str, jax.Array] = {}
        with (
            explained(cfg, self.model),
            stop_signals() as stop,
            self._progress(start) as progress,
            profiled(out / "profile" if cfg.profile else None, traced) as profile,
        ):
            self.meter.restart()
            while step < cfg.train.steps and not stop:
                profile(step, state)
                state, metrics = step_fn(state, self.next_batch())
                step += 1
                last = step == cfg.train.steps
                evaluates = last or step % cfg.train.eval_every == 0
                saves = cfg.train.save_every and (
                    last or step % cfg.train.save_every == 0
                )
                if step % cfg.train.log_every == 0 or evaluates or saves:
                    values = self._finite(step, metrics, saved)
                    values |= self.meter.read(step - logged)
                    logged = step
                    rates.append(values["tokens_per_second"])
                    left = cfg.train.steps - step
                    values["seconds_left"] = values["step_seconds"] * left
                    values["peak_memory_bytes"] = peak_memory_bytes()
                    if evaluates:
                        values["eval_loss"] = self.evaluate(eval_fn, state["params"])
                    writer.write(step, values)
                    summary |= {k: v for k, v in values.items() if v is not None}
                    progress(step, values)
                if saves:
                    self.save(step, state)
                    saved = step
                if saves or evaluates:
                    self.meter.restart()
            if stop and step > saved:
                self._finite(step, metrics, saved)
                self.save(step, state)
                saved = step
            self.checkpoints.wait()
        writer.close()
        plot_loss(
            read_metrics(writer.path), out / "loss.png", floor=self.data.unigram_entropy
        )
        # The first steps after compilation fill caches and queues.
        settled = sorted(rates[2:] or rates)
        summary["step"] = step
        summary["interrupted"] = bool(stop) and step < cfg.train.steps
        summary["checkpoint"] = str(out / "checkpoints" / str(saved)) if saved else None
        if settled:
            summary["tokens_per_second"] = settled[len(settled) // 2]
        summary["peak_memory_bytes"] = peak_memory_bytes()
        (out / "summary.json").write_text(json.dumps(summary, indent=2))
        self._last_words(summary)
        return summary

    def _compile(self, step_fn: Any, state: Any, cache: CompileCache) -> Any:
        shape = (
            self.cfg.train.accumulate, self.cfg.data.batch_size, self.cfg.data.seq_len,
        )  # fmt: skip
        names = ["tokens", "labels"]
        names += ["segment_ids", "positions"] if self.cfg.data.packing else []
        one = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        began, hits = time.perf_counter(), cache.hits
        compiled = step_fn.lower(state, dict.fromkeys(names, one)).compile()
        memory = compiled.memory_analysis()
        how = "compiled" if cache.hits == hits else "read the compiled step"
        message = f"{how} in {time.perf_counter() - began:.1f} s"
        if memory is not None:
            need = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            message += (
                f"; needs {need / 2**30:.2f} GiB a device: state "
                f"{memory.argument_size_in_bytes / 2**30:.2f}, temporaries "
                f"{memory.temp_size_in_bytes / 2**30:.2f}"
            )
        self.console.print(message, highlight=False)
        return compiled

    def _finite(self, step: int, metrics: Any, saved: int) -> dict[str, Any]:
        """Return a step's metrics as numbers, or raise NonFiniteLossError."""
        values: dict[str, Any] = {k: float(v) for k, v in metrics.items()}
        if all(np.isfinite(values[k]) for k in ("loss", "grad_norm")):
            return values
        good = f"{self.out / 'checkpoints' / str(saved)}" if saved else "none"
        raise NonFiniteLossError(
            f"step {step}: loss={values['loss']}, grad_norm={values['grad_norm']}; "
            f"last good checkpoint: {good}. Lower the learning rate, or look at the "
            "data of this step"
        )

    @contextmanager
    def _progress(self, start: int) -> Iterator[Any]:
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        total = self.cfg.train.steps
        live = self.console.is_terminal or self.console.is_jupyter
        with Progress(*columns, console=self.console, disable=not live) as bar:
            task = bar.add_task("", total=total, completed=start)

            def show(step: int, values: dict[str, Any]) -> None:
                text = f"loss {values['loss']:.4f}"
                if values.get("eval_loss") is not None:
                    text += f"  held out {values['eval_loss']:.4f}"
                text += f"  {values['tokens_per_second']:,.0f} tokens/s"
                if values.get("mfu"):
                    text += f"  MFU {values['mfu']:.1%}"
                if values.get("peak_memory_bytes"):
                    text += f"  {values['peak_memory_bytes'] / 2**30:.1f} GiB"
                bar.update(task, completed=step, description=text)
                if not live:  # a log file
                    line = f"step {step}/{total} {text}"
                    self.console.print(line, highlight=False, soft_wrap=True)

            yield show

    def _last_words(self, summary: dict[str, Any]) -> None:
        out = self.out
        if summary["interrupted"]:
            self.console.print(
                f"stopped at step {summary['step']}; run the same command to go on"
            )
            return
        line = f"done: {out}/loss.png, {out}/metrics.jsonl"
        if summary["checkpoint"]:
            line += f", {summary['checkpoint']}; next: mst-jax export {out} {out}/hf"
        self.console.print(line, highlight=False, soft_wrap=True)


def _identity(cfg: Config) -> dict[str, Any]:
    """What a run may not change when it resumes, by option.

    Files may move: `_check_same_data` counts what is in them.
    """
    source = cfg.data.source if cfg.data.source.startswith("hf:") else "files"
    data = replace(cfg.data, tokenizer=cfg.tokenizer, source=source)
    values = to_dict(replace(cfg, data=data))
    found = {"init_from": cfg.init_from, "model": values["model"]}
    values["optim"]["freeze"] = sorted(cfg.optim.freeze)
    for part in ("data", "optim"):
        found |= {f"{part}.{key}": value for key, value in values[part].items()}
    return found | {f"train.{k}": values["train"][k] for k in ("accumulate", "seed")}


def _summary(out: Path) -> dict[str, Any]:
    """Return what the run that ended here has written, or nothing."""
    try:
        return json.loads((out / "summary.json").read_text())
    except (OSError, ValueError):
        return {}


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold a run's directory, which is made.

    Raises:
        ValueError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process trains in {directory}: wait for it, or use another "
                "--out-dir"
            ) from None
        except OSError as error:  # not every network file system has locks
            logger.warning("%s is not locked against other runs: %s", directory, error)
        yield


def check_writable(directory: Path) -> None:
    """Raise ValueError if no run could be written there. Makes nothing yet."""
    there = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not there.is_dir():
        problem = f"{there} is a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"{there} cannot be written"
    else:
        return
    raise ValueError(
        f"Config.out_dir={str(directory)!r} cannot hold a run: {problem}; choose "
        "another --out-dir"
    )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list instead of dying; a second one kills."""
    caught: list[int] = []

    def handler(number: int, frame: Any) -> None:
        del frame
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        logger.warning("signal %d: saving after this step", number)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
