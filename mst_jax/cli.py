"""Command lines: `python train.py --config RECIPE [overrides]`, `mst-jax export`."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mst_jax.config import Config, ModelConfig, from_dict


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
        cfg = load_recipe(recipe)
        cfg = tyro.cli(
            tyro.conf.configure(tyro.conf.AvoidSubcommands)(Config),
            prog=f"train.py --config {recipe}",
            description=f"Train {recipe}. Every option overrides the recipe.",
            default=cfg,
            args=overrides,
        )
        # Here, so that --help and a mistyped option answer at once.
        from mst_jax.trainer import NonFiniteLossError, train

        try:
            train(cfg)
        except NonFiniteLossError as error:
            return _fail(error)
    except (ValueError, FileNotFoundError, ImportError, NotImplementedError) as error:
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
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config()")
    cfg = module.get_config()
    if not isinstance(cfg, Config):
        raise ValueError(f"{path}: get_config() returned {type(cfg).__name__}")
    return cfg


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
        first = path.read_text().split('"""')[1].strip().splitlines()[0]
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
    import jax

    from mst_jax import hf
    from mst_jax.checkpoint import Checkpoints
    from mst_jax.model import init_params
    from mst_jax.train_step import init_train_state

    directory, step = _find_checkpoint(args.checkpoint)
    checkpoints = Checkpoints(directory, keep=1)
    extra = checkpoints.extra(step)
    cfg = from_dict(extra["config"])
    model = from_dict(extra["model"], ModelConfig)
    abstract = jax.eval_shape(lambda: init_train_state(cfg, init_params(model, 0)))
    # The optimizer's moments stay on the disk: there may be no room for them here.
    params = {"params": abstract["params"]}
    restored = checkpoints.restore(params, step, partial=True)
    assert restored is not None  # extra() has found one
    step, state, _ = restored
    source = next(
        (p for p in (extra["source"], cfg.data.tokenizer) if p and Path(p).is_dir()),
        None,
    )
    hf.export_hf(state["params"], model, args.out, source_dir=source, dtype=args.dtype)
    print(f"wrote step {step} of {directory} to {args.out}")
    if source is None:
        print("without tokenizer files: the run's source directory is not there")


def _find_checkpoint(path: Path) -> tuple[Path, int | None]:
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    if path.is_dir() and path.name.isdigit():
        return path.parent, int(path.name)
    raise FileNotFoundError(
        f"{path} is neither a run's directory, with checkpoints/ in it, nor one "
        "checkpoint such as runs/tiny/checkpoints/100"
    )


def main() -> int:
    """Run the console command `mst-jax`."""
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            {"export": Export}, prog="mst-jax"
        )
        export(command)
    except (ValueError, FileNotFoundError, ImportError, NotImplementedError) as error:
        return _fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
