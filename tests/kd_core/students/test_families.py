"""Every family against transformers on random weights. The figures are a table in docs/students.md."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers

from kd_core.students.families.registry import FAMILIES as REGISTRY
from kd_core.students.huggingface.save import save_pretrained
from kd_core.students.starts.start import Pretrained, build_student
from tests.kd_core.students.family_checks import CHECKS, Comparison
from tests.kd_core.students.models import CPU, MODELS, YARN, difference, load, their_model

TOLERANCE = 1e-4
PAGE = Path(__file__).parents[3] / "docs" / "students.md"
BEGIN, END = "<!-- written by tests/kd_core/students/test_families.py -->\n", "<!-- end -->"
# Read as another family, under which it is exported.
READ_AS_OTHERS = {"gemma3"}
COMPARED = [family for family in REGISTRY if family not in READ_AS_OTHERS]
MEASURED: dict[str, dict[str, float]] = {}


def test_every_family_of_the_registry_has_a_model() -> None:
    assert MODELS.keys() == set(COMPARED)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by an older name
@pytest.mark.parametrize("family", COMPARED)
def test_a_family_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    compared = Comparison(MODELS[family], tmp_path)
    assert compared.ours.arch.family == family
    MEASURED[family] = {check: measure(compared) for check, measure in CHECKS.items()}
    assert {check: error for check, error in MEASURED[family].items() if not error < TOLERANCE} == {}
    assert compared.cached() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "layers"),
    [("smollm3, windows, biases", (2, 1)), ("olmo3, yarn", (1,)), ("olmo3, yarn", (2, 1)), ("phi3, longrope", (0, 2))],
)
def test_layers_keep_their_windows_and_their_rope(name: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    """In an export too: transformers computes what its own model does with these layers alone."""
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build_student(Pretrained(str(tmp_path / "theirs"), keep_layers=layers), CPU, seed=0).eval()
    save_pretrained(ours, tmp_path / "ours", tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert difference(ours, again) < TOLERANCE
    # Its settings by layer are those of the kept ones.
    for setting in ("layer_types", "no_rope_layers"):
        if kinds := getattr(theirs.config, setting, None):
            assert getattr(again.config, setting) == [kinds[layer] for layer in layers]


OLDER_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.2}
OLDER_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.5, 4.0, 9.0]}
# For each model, what a file leaves out, and what stands there instead.
PUBLISHED: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "Phi-4-mini": (
        "phi3, longrope", ("rope_parameters",),
        {"rope_scaling": OLDER_LONGROPE, "rope_theta": 1e3, "partial_rotary_factor": 0.75},
    ),
    "Phi-3, as read first": (
        "phi3, longrope", ("rope_parameters", "original_max_position_embeddings"),
        {"rope_scaling": {**OLDER_LONGROPE, "type": "yarn"}, "partial_rotary_factor": 0.75},
    ),
    "OLMo 3": ("olmo3", ("rope_parameters",), {"rope_scaling": OLDER_YARN, "rope_theta": 5e5}),
    "OLMo 3, defaults": ("olmo3", ("rope_parameters", "layer_types", "sliding_window"), {}),
    "Gemma 3, context beside RoPE": (
        "gemma3", (),
        {
            "original_max_position_embeddings": 48,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e3}},
        },
    ),
    "gpt-oss, unscaled": ("gpt-oss", (), {"rope_parameters": {}}),
    "GLM-4": ("glm4", ("rope_parameters", "attention_bias"), {"rope_theta": 1e3}),
    "SmolLM3": (
        "smollm3", ("rope_parameters", "no_rope_layers", "tie_word_embeddings", "layer_types"),
        {"no_rope_layer_interval": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_mean_what_transformers_takes(name: str, tmp_path: Path) -> None:
    """Older forms of RoPE's fields, and fields that are left out."""
    model, left_out, changes = PUBLISHED[name]
    their_model(model).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {field: value for field, value in json.loads(path.read_text()).items() if field not in left_out}
    path.write_text(json.dumps({**config, **changes}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert difference(load(tmp_path), theirs) < TOLERANCE


def _row(family: str) -> str:
    cells = [f"{error:.0e}".replace("e-0", "e-") if error else "0" for error in MEASURED[family].values()]
    return f"| `{family}` | {' | '.join(cells)} |\n"


def _passing(table: str) -> dict[str, list[bool]]:
    """Returns by family which cells of a table are below the bound."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:]]
    return {family: [float(cell) < TOLERANCE for cell in cells] for family, *cells in rows}


def test_the_table_of_the_documents_is_measured() -> None:
    """Its figures may differ on another machine. Families, checks and passing cells may not."""
    if MEASURED.keys() != set(COMPARED):
        pytest.skip("only some families were compared in this run")
    head = f"| family | {' | '.join(CHECKS)} |\n|{'---|' * (1 + len(CHECKS))}\n"
    table = head + "".join(_row(family) for family in COMPARED)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    written, after = rest.split(END)
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(before + BEGIN + table + END + after, encoding="utf-8")
        written = table
    assert written.startswith(head), "checks changed: run `UPDATE_GOLDEN=1 python -m pytest` on this file"
    assert _passing(written) == _passing(table), "families changed: run `UPDATE_GOLDEN=1 python -m pytest` on this file"
