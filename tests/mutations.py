"""Do the tests of the losses notice? Breaks a copy of the code in one place after another and runs them.

    make mutations            # a table; ends with 1 where a mutant survives; ten to twenty minutes of one core

Each mutant is one replacement, of the first match in one file. Left out are the tests of what lies around the loss
(`test_composition.py`), which take long and see nothing that the others do not.
"""
# ruff: noqa: E501 (a table reads better in long lines)

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = ("tests/kd_core/losses", "tests/reference")
# Interpreted kernels take long, so they are run for mutants of kernels alone.
KERNEL_TESTS = "tests/kd_core/losses/fused/test_triton_backend.py"


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str


MUTANTS = [
    Mutant("a sign in log p - log q", "sparse_view", "return self.teacher - self.student", "return self.student - self.teacher"),
    Mutant("a sign in the entries' gradient", "fused/softmax", "g.entries - on_support", "g.entries + on_support"),
    Mutant("a sign of the z-loss's gradient", "fused/softmax", "- g.log_normaliser", "+ g.log_normaliser"),
    Mutant("no tau squared", "objective", "temperatures.teacher * temperatures.student if", "1.0 if"),
    Mutant("tau for tau squared", "objective", "temperatures.teacher * temperatures.student if", "temperatures.teacher if"),
    Mutant("tau squared on the value alone", "fused/torch_backend", "alpha=1 / temperature", "alpha=1 / temperature**3"),
    Mutant("arguments of KL swapped", "divergences", "(events.teacher_probs() * events.log_ratio())", "(-events.student_probs() * events.log_ratio())"),
    Mutant("KL that is cross-entropy", "divergences", "(events.teacher_probs() * events.log_ratio())", "(-events.teacher_probs() * events.student)"),
    Mutant("one side renormalised", "tails", "log_softmax_over(view.student_relative() / temperatures.student, used), used", "view.student_log_probs, used"),
    Mutant("teacher not renormalised", "tails", "teacher = log_softmax_over(view.teacher_log_probs / temperatures.teacher, used)", "teacher = view.teacher_log_probs"),
    Mutant("teacher's tail as 1 - sum p", "tails", "tail = torch.where(tail > -torch.inf, tail, EMPTY_TAIL)", "tail = torch.log1p(-entries.exp().sum(dim=1).clamp(max=1 - 1e-8))"),
    Mutant("student's tail as 1 - sum q", "fused/softmax", "student_tail=(stats.tail_logsumexp - normaliser)", "student_tail=torch.log1p(-(on_support - normaliser).exp())"),
    Mutant("clamp that is a no-op", "tails", "torch.where(tail > -torch.inf, tail, EMPTY_TAIL)", "tail"),
    Mutant("labels shifted", "fused/loss", "torch.where(mask, labels, 0)", "torch.where(mask, labels, 0).roll(1)"),
    Mutant("masked hidden states not silenced", "fused/chunks", "torch.where(mask[:, None], self.positions.hidden[rows], 0.0)", "self.positions.hidden[rows]"),
    Mutant("masked positions scored", "fused/chunks", "value = torch.where(mask, position_losses, 0.0).sum()", "value = position_losses.sum()"),
    Mutant("mean over a chunk", "fused/chunks", "value = torch.where(mask, position_losses, 0.0).sum()", "value = torch.where(mask, position_losses, 0.0).mean()"),
    Mutant("repeated ids counted again", "fused/torch_backend", "in_shard & (logits.gather(1, columns) == marks)", "in_shard"),
    Mutant("unused entries in the support", "fused/torch_backend", "indices = torch.where(in_shard, own_index, in_shard.int().argmax(dim=1, keepdim=True))", "indices = own_index.expand_as(in_shard)"),
    Mutant("GKD's JSD, 0 at its ends", "divergences", "to_teacher / (1 - beta) + to_student / beta", "beta * to_teacher + (1 - beta) * to_student"),
    Mutant("beta for 1 - beta", "divergences", "    beta = parameters.beta", "    beta = 1 - parameters.beta"),
    Mutant("skew of the wrong side", "divergences", "log_mixture(-events.log_ratio(), 1 - parameters.skew)", "log_mixture(-events.log_ratio(), parameters.skew)"),
    Mutant("mixture by logaddexp alone", "divergences", "return torch.where(beyond, far, near)", "return far"),
    Mutant("adaptive shares differentiated", "divergences", "events.student_probs().detach()", "events.student_probs()"),
    Mutant("no head weight of its own", "divergences", "parameters.head_weight * (p", "parameters.tail_weight * (p"),
    Mutant("head one entry larger", "divergences", "rank >= parameters.head_size", "rank > parameters.head_size"),
    Mutant("bucket in the head", "divergences", "(0, 1), value=True)", "(0, 1), value=False)"),
    Mutant("padding takes probability", "fused/lm_head", "V = len(weight) if form.vocab_size is None else form.vocab_size", "V = len(weight)"),
    Mutant("soft cap without its slope", "fused/torch_backend", "dlogits.mul_(self._slope)", "pass"),
    Mutant("scale not in the gradient", "fused/torch_backend", "dlogits.mul_(self.head.scale)", "pass"),
    Mutant("only the last chunk's gradient", "fused/cpu_backend", "total.addmm_(dproduct.t(), hidden)", "total.addmm_(dproduct.t(), hidden, beta=0)"),
    Mutant("bfloat16 logits", "fused/cpu_backend", "multiply_(hidden, rows, out[:, block], matmul_dtype)", "out[:, block] = torch.mm(hidden, rows.t()).bfloat16()"),
    Mutant("smoothing over the support alone", "objective", "mean / (size + on_support)", "mean / on_support"),
    Mutant("tail's mean on the support too", "fused/softmax", "entry_gradients = entry_gradients - torch.where(view.distinct, tail_offset[:, None], 0.0)", "pass"),
    Mutant("loss of selected positions not scaled", "token_selection", "scored / selected.clamp(min=1)", "1.0"),
    Mutant("the least uncertain kept", "token_selection", "argsort(descending=True, stable=True)", "argsort(stable=True)"),
    Mutant("weights ignored", "fused/chunks", "loss + weights[name] * value", "loss + value"),
    Mutant("scale ignored in the gradient", "fused/softmax", "scaled = loss * scale", "scaled = 1 * loss"),
    Mutant("repeated ids counted again, support alone", "fused/topk_only", "return used & torch", "return used | torch"),
    Mutant("a term that needs more taken to the support", "objective", "return not TAILS[self.tail].support_only or needs_entropy", "return not TAILS[self.tail].support_only"),
    Mutant("only the last chunk's rows", "fused/topk_only", "gradients.weight.index_add_(0, ids, drows.flatten(0, 1))", "gradients.weight.index_copy_(0, ids, drows.flatten(0, 1))"),
    Mutant("soft cap without its slope, support alone", "fused/topk_only", "dlogits = dlogits * slope", "pass"),
    Mutant("scale not in the gradient, support alone", "fused/topk_only", "dlogits = dlogits * self.head.scale", "pass"),
    Mutant("top-1 from the support alone", "fused/loss_metrics", "support_wins & (at_teacher_top1 >= best_on_support)", "at_teacher_top1 >= best_on_support"),
    Mutant("padding behind the vocabulary counted, kernel", "../kernels/logit_kernels", 'mask=columns < V, other=float("-inf"))', "mask=columns < V, other=0.0)"),
    Mutant("soft cap without its slope, kernel", "../kernels/logit_kernels", "gradient *= 1.0 - tanh * tanh", "gradient *= 1.0"),
    Mutant("no mean of the tail in the gradient, kernel", "../kernels/logit_kernels", "factor_ptr, T) + offset", "factor_ptr, T)"),
    Mutant("a label outside the support without its tail, kernel", "../kernels/logit_kernels", "slot == SPECIAL - 1", "slot < 0"),
    Mutant("repeated ids not added up, kernel", "fused/triton_backend", "values=slots.gather(1, self._slots)", "values=values"),
    Mutant("tau ignored in the gradient, kernel", "fused/triton_backend", "value if t == 1 else value / t", "value"),
]  # fmt: skip


def run_tests(copy: Path, mutant: Mutant | None = None) -> tuple[bool, str]:
    """Run the tests that know a mutant, and return whether they pass, and the first that does not."""
    of_kernels = mutant is not None and any(word in mutant.file for word in ("kernels", "triton"))
    selection = [KERNEL_TESTS, "-k", "not sm_90"] if of_kernels else [f"--ignore={KERNEL_TESTS}", TESTS[0]]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "-m",
        "not slow",
        f"--ignore={TESTS[0]}/test_composition.py",
        *selection,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, failed[0].split("::")[-1].split(" - ")[0] if failed else done.stdout[-300:]


def make_copy(folder: Path) -> Path:
    for part in ("kd_core", *TESTS):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [ROOT / "pyproject.toml", *(ROOT / "tests").glob("*.py")]:
        shutil.copy(path, folder / path.parent.relative_to(ROOT))
    return folder


def survives(copy: Path, mutant: Mutant) -> tuple[bool, str]:
    """Break, test, mend."""
    path = copy / f"kd_core/losses/{mutant.file}.py"
    text = path.read_text()
    assert text.count(mutant.old) >= 1, f"{mutant.name}: {mutant.old!r} is not in {mutant.file}.py any more"
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    try:
        return run_tests(copy, mutant)
    finally:
        path.write_text(text)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = make_copy(Path(folder))
        passed, first = run_tests(copy)
        if not passed:
            sys.exit(f"the tests fail without any mutant: {first}")
        survivors = 0
        for mutant in MUTANTS:
            alive, killer = survives(copy, mutant)
            survivors += alive
            print(f"{'SURVIVES' if alive else 'caught':10}{mutant.name:45}{killer if not alive else ''}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
