"""Memory that a teacher takes on a rank of a layout, computed on the meta device, without starting a process."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.teacher.scorer import check_fits
from data.teacher.teacher_layout import TeacherParallel
from data.teacher.transformers_layout import check_plans
from kd_core.logit_products import chunk_positions
from kd_core.parallel.layout import Layout, ParameterFacts, RankHolding, holding_of_fullest_rank
from kd_core.parallel.parallelize import fullest_rank_holding
from kd_core.students.starts.start import Pretrained, meta_student
from kd_core.students.transformers_student.transformers_config import meta_model, read_config

DIVIDED = re.compile("colwise|rowwise|grouped_gemm")  # transformers' styles that divide a parameter


def _parameter_facts(model: Any, parallel: TeacherParallel, layout: Layout) -> Iterator[ParameterFacts]:
    """Yields how a transformers model's parameters are divided, by the rules of its plans."""
    plan: dict[str, str] = {**model.tp_plan, **(model.ep_plan if parallel.expert_parallel else {})}
    for name, parameter in model.named_parameters():
        # "model.layers.3.mlp.up_proj.weight" has the rule of "model.layers.*.mlp.up_proj", or one of its own.
        rule = re.sub(r"\.\d+\.", ".*.", name)
        style = plan.get(rule) or plan.get(rule.rpartition(".")[0]) or ""
        is_divided = layout.tensor > 1 and DIVIDED.search(style)
        block = re.search(r"\.(\d+)\.", name)
        yield ParameterFacts(tuple(parameter.shape), 0 if is_divided else None, block and int(block[1]), False)


def rank_holding(folder: Path, scorer: str, parallel: TeacherParallel, layout: Layout) -> RankHolding:
    """Returns what the fullest rank holds of a teacher's weights.

    Raises:
        UsageError: the layout does not fit the teacher.
    """
    if scorer == "decoder":
        model = meta_student(Pretrained(str(folder)), None)
        check_fits(model.arch, layout)
        return fullest_rank_holding(model, layout, sequence_parallel=False)
    shapes = meta_model(read_config(folder), folder)
    check_plans(shapes, parallel, folder)
    return holding_of_fullest_rank(layout, _parameter_facts(shapes, parallel, layout))


def describe_memory(
    folder: Path, scorer: str, vocab_size: int, parallel: TeacherParallel, ranks: int, dtype: torch.dtype
) -> str:
    """Returns a line on the layout of so many ranks, and on what the fullest of them holds of a teacher.

    Raises:
        UsageError: the layout does not fit the number of ranks.
    """
    layout = parallel.engine().layout(ranks)
    holding = rank_holding(folder, scorer, parallel, layout)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = 4 * chunk_positions(vocab_size, device) * -(-vocab_size // layout.tensor)
    line = f"{ranks} ranks: {layout}; a rank holds {dtype.itemsize * holding.parameters / 1e9:.3g} GB of weights"
    if layout.shards > 1:
        # One block computes while the next one is gathered. What is outside of blocks stays gathered.
        gathered = min(2 * holding.largest_block, holding.block_numbers) + holding.root_numbers
        line += f", gathers {dtype.itemsize * gathered / 1e9:.3g} GB"
    return f"{line}, and has {logits / 1e9:.3g} GB of logits at a time, without activations"
