"""Command lines: `train.py --config RECIPE [overrides]`, `mst-jax export`, `plan`."""

import ast
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mst_jax.config import PRESETS, Config, ModelConfig, from_dict


def train_main(recipes: Path, args: list[str] | None = None) -> int:
    """Run the recipe that the arguments name; return the exit status.

    Args:
        recipes: directory of recipe files, each with `get_config() -> Config`.
        args: command line without the program's name; None is `sys.argv[1:]`.
    """
    args = sys.argv[1:] if args is None else list(args)
    try:
        recipe, overrides = _split_config(args)
        if recipe is None:
            print(_usage(recipes))
            return 0 if {"-h", "--help"} & set(args) else 2
        cfg = _override(
            load_recipe(recipe), overrides, f"train.py --config {recipe}",
            f"Train {recipe}. Every option overrides the recipe.",
        )  # fmt: skip
        budget = cfg.train.memory_budget
        for name in _option_names(overrides):
            if budget is not None and name in PLANNED:
                raise ValueError(
                    f"--{name} is what the planner chooses, within train.memory_budget="
                    f"{budget!r}: leave it out, or add --train.memory-budget None"
                )
        # Here, so that --help and a mistyped option answer at once.
        from mst_jax.checkpoint import SaveError
        from mst_jax.memory import OutOfMemoryError
        from mst_jax.trainer import NonFiniteLossError, train

        try:
            train(cfg)
        except (NonFiniteLossError, OutOfMemoryError, SaveError) as error:
            return _fail(error)
        except KeyboardInterrupt:  # before the loop, or the second one in it
            message = "interrupted: nothing was saved since the last checkpoint"
            print(message, file=sys.stderr)
            return 130
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        return _fail(error)
    return 0


def load_recipe(path: str | Path) -> Config:
    """Return the `get_config()` of a recipe file.

    Raises:
        FileNotFoundError: no such file; names the recipes beside it.
        ValueError: the file has no get_config, or it returns something else.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.py"))
        raise FileNotFoundError(f"no recipe {path}; there are {beside}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no recipe: a .py file with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError(f"{path} has no get_config()")
        cfg = module.get_config()
    except (SyntaxError, TypeError) as error:  # a field that does not exist, say
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(cfg, Config):
        raise ValueError(f"{path}: get_config() returned {type(cfg).__name__}")
    return cfg


def _override(cfg: Config, args: list[str], prog: str, description: str) -> Config:
    """Return the recipe's configuration with the options of a command line."""
    config = tyro.conf.configure(tyro.conf.AvoidSubcommands)(Config)
    return tyro.cli(config, prog=prog, description=description, default=cfg, args=args)


def _option_names(args: list[str]) -> list[str]:
    """Return the options among arguments, as in 'train.plan'."""
    options = [arg for arg in args if arg.startswith("--")]
    return [a[2:].partition("=")[0].replace("_", "-") for a in options]


def _split_config(args: list[str]) -> tuple[str | None, list[str]]:
    rest, recipe = [], None
    values = iter(args)
    for arg in values:
        if arg == "--config":
            recipe = next(values, None)
            if recipe is None:
                raise ValueError("--config needs a recipe, for example configs/tiny.py")
        elif arg.startswith("--config="):
            recipe = arg.removeprefix("--config=")
        else:
            rest.append(arg)
    return recipe, rest


def _usage(recipes: Path) -> str:
    lines = ["usage: python train.py --config RECIPE [overrides]", "", "recipes:"]
    for path in sorted(recipes.glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = about.partition("\n")[0]
        lines.append(f"  {path.parent.name}/{path.name:<16} {first}")
    lines += ["", "python train.py --config RECIPE --help lists every option."]
    return "\n".join(lines)


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


@dataclass(frozen=True)
class Export:
    """Write a checkpoint as Hugging Face safetensors, config.json and tokenizer."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run's directory (its newest whole checkpoint), or one checkpoint in it."""
    out: Annotated[Path, tyro.conf.Positional]
    """Directory to write; must be new or empty."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the tensors; the checkpoint's own by default."""


def export(args: Export) -> None:
    """Export a checkpoint.

    Raises:
        ValueError, FileNotFoundError: no whole checkpoint, or `out` is not empty.
    """
    from mst_jax import hf
    from mst_jax.checkpoint import Checkpoints
    from mst_jax.train_step import abstract_state

    directory, step = _find_checkpoint(args.checkpoint)
    checkpoints = Checkpoints(directory, keep=1)
    extra = checkpoints.extra(step)
    cfg = from_dict(extra["config"])
    model = from_dict(extra["model"], ModelConfig)
    # The optimizer's moments stay on the disk: there may be no room for them here.
    params = {"params": abstract_state(cfg, model)["params"]}
    restored = checkpoints.restore(params, step, partial=True)
    assert restored is not None  # extra() has found one
    step, state, _ = restored
    source = extra["source"]
    if source is not None and not Path(source).is_dir():
        source = None
    tokenizer = _tokenizer_dir(cfg, source)
    hf.export_hf(
        state["params"], model, args.out,
        source_dir=source, tokenizer_dir=tokenizer, dtype=args.dtype,
    )  # fmt: skip
    print(f"wrote step {step} of {directory} to {args.out}")
    if cfg.tokenizer == "bytes":
        print("without tokenizer files: the tokens are bytes")
    elif tokenizer is None:
        print(f"without tokenizer files: those of {cfg.tokenizer!r} are not here")
    elif not any((args.out / name).exists() for name in hf.VOCABULARIES):
        print(
            f"without the tokenizer's vocabulary: {tokenizer} has none of "
            f"{', '.join(hf.VOCABULARIES)}"
        )


def _tokenizer_dir(cfg: Config, source: str | None) -> str | None:
    """Return where the files of the run's tokenizer are, without a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = cfg.tokenizer
    if name == "bytes":
        return None
    if (directory := Path(name).expanduser()).is_dir():
        return str(directory)
    if name == cfg.init_from:
        return source
    try:  # trained with, so in the hub's cache
        return snapshot_download(name, local_files_only=True)
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError):
        return None


def _find_checkpoint(path: Path) -> tuple[Path, int | None]:
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    if path.is_dir() and path.name.isdigit():
        return path.parent, int(path.name)
    raise FileNotFoundError(
        f"{path} is neither a run's directory, with checkpoints/ in it, nor one "
        "checkpoint such as runs/tiny/checkpoints/100"
    )


@dataclass(frozen=True)
class Plan:
    """Say how long a sequence a GPU can train, and how. Needs no GPU.

    Other options are train.py's and override the recipe, such as --optim.moment-dtype
    int8 or --init-from DIRECTORY.
    """

    config: Path
    """Recipe, such as configs/llama3_8b.py."""
    gpu: str
    """t4, l4, a10g, rtx-4090, a100-40gb, a100-80gb, h100, h200 or b200."""
    host_memory: str = "0GiB"
    """Host memory that may be pinned, such as 120GiB."""
    device_memory: str | None = None
    """Device memory for the process; by default 92% of the GPU's."""
    seq_len: int | None = None
    """Tokens, for the fastest plan; by default the longest sequence that fits."""
    verify: bool = False
    """Compile the real step for that GPU too (needs the CUDA plugin, no GPU)."""
    out: Path = Path("plan.png")
    """Figure of memory against sequence length."""


class VerifyError(Exception):
    """The planned step does not compile."""


PLANNED = (
    "train.plan", "train.head-groups", "train.prefetch", "train.no-prefetch",
    "train.mlp-chunk-size", "train.loss-chunk-size", "train.vocab-chunk-size",
)  # fmt: skip
"""Options of train.py that the planner sets."""
ARGUMENTS = {
    "data.seq-len": "give --seq-len, or neither for the longest that fits",
    "train.memory-budget": "give --device-memory",
    "train.host-memory": "give --host-memory",
}
"""Those that `mst-jax plan` has its own for."""


def plan(args: Plan, overrides: list[str]) -> None:
    """Print the plan, its table and, if asked for, the compiled figure.

    Args:
        args: of the command.
        overrides: options of train.py.

    Raises:
        ValueError: nothing fits, or an argument is wrong.
        NotImplementedError, ImportError: see `compile_only.py`.
        VerifyError: the compilation failed, or took too long.
    """
    from mst_jax.compile_only import compile_step
    from mst_jax.gpus import find_gpu
    from mst_jax.hf import param_shapes
    from mst_jax.optim import check_frozen
    from mst_jax.plan import parse_bytes
    from mst_jax.plan_report import report
    from mst_jax.planner import default_budget
    from mst_jax.prediction import GIB, show

    cfg, gpu = load_recipe(args.config), find_gpu(args.gpu)
    way_out = dict.fromkeys(PLANNED, "leave it out") | ARGUMENTS
    for name in _option_names(overrides):
        if name in way_out:
            raise ValueError(f"--{name} is what the plan chooses: {way_out[name]}")
    cfg = _override(
        cfg, overrides, "mst-jax plan",
        f"Options that override {args.config}, beside those of `mst-jax plan --help`.",
    )  # fmt: skip
    model = _model_of(cfg)
    check_frozen(param_shapes(model), cfg.optim.freeze)
    device = default_budget(gpu)
    if args.device_memory is not None:
        device = parse_bytes(args.device_memory)
    if device > gpu.usable:
        raise ValueError(
            f"device_memory={args.device_memory!r}: a process can hold "
            f"{show(gpu.usable)} of {gpu.name}; give less, or leave it out to plan "
            f"with {show(default_budget(gpu))}"
        )
    text, planned, prediction = report(
        cfg, model, gpu, recipe=args.config, overrides=overrides, seq_len=args.seq_len,
        device_bytes=device, host_bytes=parse_bytes(args.host_memory), png=args.out,
    )  # fmt: skip
    print(text)
    if args.verify:
        try:
            compiled = compile_step(planned, model, gpu)
        except NotImplementedError:  # a RuntimeError, and says itself what to do
            raise
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            raise VerifyError(f"the plan above is not verified: {error}") from error
        workspace = prediction.peak_device - prediction.peak_compiled
        print(
            f"Compiled for {gpu.name}: {compiled.device / GIB:.2f} GiB, predicted "
            f"{prediction.peak_compiled / GIB:.2f}; with cuDNN's workspace "
            f"{(compiled.device + workspace) / GIB:.2f} GiB, predicted "
            f"{prediction.peak_device / GIB:.2f}. Host: {compiled.host / GIB:.2f} GiB, "
            f"predicted {prediction.peak_host / GIB:.2f}."
        )


def _model_of(cfg: Config) -> ModelConfig:
    """The shape of a recipe's model: of a known checkpoint without a download."""
    if cfg.model is not None:
        return cfg.model
    assert cfg.init_from is not None  # a Config has a model or init_from
    source = os.path.expanduser(cfg.init_from)
    known = {
        "meta-llama/Llama-2-7b-hf": "llama2_7b",
        "meta-llama/Meta-Llama-3-8B": "llama3_8b",
        "meta-llama/Llama-3.2-1B": "llama32_1b",
        "meta-llama/Llama-3.1-70B": "llama31_70b",
    }
    if source in known:
        return PRESETS[known[source]]
    from mst_jax.hf_config import model_config_from_hf

    if Path(source).is_dir():
        return model_config_from_hf(source)
    from huggingface_hub import hf_hub_download

    return model_config_from_hf(hf_hub_download(source, "config.json"))


def main() -> int:
    """Run the console command `mst-jax`."""
    try:
        command, overrides = tyro.cli(
            Annotated[Export, tyro.conf.subcommand("export")]
            | Annotated[Plan, tyro.conf.subcommand("plan")],
            prog="mst-jax", return_unknown_args=True,
        )  # fmt: skip
        if isinstance(command, Plan):
            plan(command, overrides)
        elif overrides:
            raise ValueError(f"mst-jax export has no option {overrides[0]!r}")
        else:
            export(command)
    except (
        ValueError, OSError, ImportError, NotImplementedError, VerifyError,
    ) as error:  # fmt: skip
        return _fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
