"""Every config builds the model its header describes."""

import re
from pathlib import Path

from configurator import run_file
from model import GPT, GPTConfig

import pytest
import torch

CONFIGS = sorted((Path(__file__).parent.parent / "config").glob("*.py"))
WORDS = r"(\d+) layers?, (\d+) heads, width (\d+)"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_builds_the_model_its_header_describes(path):
    header = "\n".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    layers, heads, width = map(int, re.search(WORDS, header).groups())
    parameters = int(re.search(r"([\d,]+) parameters", header).group(1).replace(",", ""))
    vocabulary = int(re.search(r"vocabulary ([\d,]+)", header).group(1).replace(",", ""))
    assert f"config/{path.name}" in header, "the header gives the command"

    import train

    keys = {k: getattr(train, k) for k in GPTConfig.__dataclass_fields__ if hasattr(train, k)}
    settings = keys | {k: v for k, v in run_file(str(path), {}).items() if k in keys}
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=vocabulary, **settings))
    assert (model.config.n_layer, model.config.n_head, model.config.n_embd) == (layers, heads, width)
    assert model.num_params() == parameters
