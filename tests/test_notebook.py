"""The notebooks run from top to bottom, hold no outputs and define nothing."""

import ast
import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama of Hugging Face's, with a tokenizer of bytes in pairs."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator([Path(__file__).read_text()], 300, special_tokens=["<end>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw._tokenizer, eos_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    model = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(model).save_pretrained(folder)
    return folder


@notebooks
def test_runs(path, monkeypatch, checkpoint, tmp_path):
    monkeypatch.setenv("CHECKPOINT", str(checkpoint))  # not one of the hub
    # Progress bars without ipywidgets, which Colab and Kaggle have.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    # A kernel of this very Python, whatever kernels the machine has registered,
    # compiled as fast as the tests but without the virtual devices of conftest.py.
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [f for f in flags if not f.startswith("--xla_force_host_platform")]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    kernel = AsyncKernelManager(kernel_name="python3")
    kernel.kernel_spec.argv = [
        sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}",
    ]  # fmt: skip
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, km=kernel, timeout=300, resources=where).execute()
    printed = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not any("Warning" in text for text in printed), printed


@notebooks
def test_is_committed_without_outputs(path):
    for cell in code_cells(path):
        assert cell.outputs == [] and cell.execution_count is None


@notebooks
def test_defines_nothing(path):
    for cell in code_cells(path):
        lines = cell.source.splitlines()
        source = "\n".join(
            line.replace(line.lstrip(), "pass") if line.lstrip()[:1] in "%!" else line
            for line in lines
        )
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, defined)]
        assert not nodes, [node.name for node in nodes]
