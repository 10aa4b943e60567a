"""Compares losses, caches and a short training of this tree with those of an earlier commit, bit by bit.

    python -m tests.same_bits [COMMIT]        COMMIT: HEAD, which tells what uncommitted changes do

After a change of form alone, every hash is the same on one machine. Losses are computed by the public surface
(docs/library.md), caches and students by the commands, so that commits with other modules can be compared too. Where
a commit lacks the surface, its losses are left out.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().double().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def loss_hashes() -> dict[str, str]:
    """Hashes sums and gradients of every divergence and tail, with the modules that this process imports."""
    try:
        from kd_core.errors import UsageError  # noqa: PLC0415 (of the tree that is asked, not of this one)
        from kd_core.losses.divergences import DIVERGENCES  # noqa: PLC0415
        from kd_core.losses.fused.loss import fused_loss  # noqa: PLC0415
        from kd_core.losses.objective import CrossEntropy, Distillation, Objective  # noqa: PLC0415
        from kd_core.losses.tails import TAILS  # noqa: PLC0415
        from kd_core.types import LmHeadForm, TeacherTopK  # noqa: PLC0415
    except ImportError:
        return {}  # the names of the public surface are of 0.2

    N, V, K, D = 300, 5003, 16, 48
    random = torch.Generator().manual_seed(0)
    teacher_logits = 3 * torch.randn(N, V, generator=random)
    ranked, ids = teacher_logits.log_softmax(dim=1).topk(K)
    teacher = TeacherTopK(ids, ranked, torch.log1p(-ranked.exp().sum(dim=1)))
    labels, mask = torch.randint(V, (N,), generator=random), torch.arange(N) % 7 != 0
    hidden, weight = torch.randn(N, D, generator=random), 0.3 * torch.randn(V + 5, D, generator=random)
    forms = {"plain": LmHeadForm(vocab_size=V), "capped": LmHeadForm(0.1 * weight[:, 0], V, scale=0.5, soft_cap=4.0)}
    hashes: dict[str, str] = {}
    for divergence in DIVERGENCES:
        for tail in TAILS:
            for dtype in (torch.float32, torch.bfloat16):
                for name, form in forms.items():
                    try:
                        distillation = Distillation(divergence=divergence, tail=tail, student_temperature=1.5)
                        terms = {"kd": distillation, "ce": CrossEntropy(weight=0.5, label_smoothing=0.1)}
                    except UsageError:
                        continue
                    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
                    objective = Objective(terms, chunk_tokens=128, observe=("student_entropy", "temperature"))
                    result = fused_loss(leaves[0], leaves[1], teacher, labels, mask, objective, 1 / N, form)
                    result.total.backward()
                    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
                    key = f"loss: {divergence} {tail} {name} {str(dtype).removeprefix('torch.')}"
                    hashes[key] = digest(*(value for _, value in sorted(result.sums.items())), *gradients)
    return hashes


def run(tree: Path, folder: Path, *arguments: str) -> str:
    """Runs Python in `folder` with the packages of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


def tree_hashes(tree: Path, inputs: Path, folder: Path) -> dict[str, str]:
    """Hashes what a tree makes of the inputs: losses, both caches and the exported students of two trainings."""
    folder.mkdir()
    hashes = json.loads(run(tree, folder, str(Path(__file__)), "--losses"))
    export = [
        "quickstart_export", f"corpus.path={inputs / 'corpus'}", f"teacher={inputs / 'teacher'}",
        "train_tokens=none", "validation_tokens=none", "validation_share=0.2", "selection.top_k=8", "row_length=32",
        "block_positions=128", "shard_bytes=4096", "dtype=float32",
    ]  # fmt: skip
    run(tree, folder, "-m", "launchers.kd", "export-teacher", "--out=cache", *[f"--config={item}" for item in export])
    for path in sorted((folder / "cache").rglob("*.tar")):
        hashes[f"cache: {path.relative_to(folder)}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for precision in ("float32", "bfloat16"):
        items = [
            "quickstart", f"student.folder={inputs / 'teacher'}", "student.keep_layers=(0, 3)",
            "shards.path=cache/train", "evaluation.shards.path=cache/validation", "collate.row_length=32",
            "tokens_per_step=128", "steps=6", "checkpoint.every=3", "evaluation.every=3", "schedule.warmup_steps=2",
            "parallel.micro_batch_rows=2", f"parallel.precision={precision}",
        ]  # fmt: skip
        run(tree, folder, "-m", "launchers.kd", "train", f"--run_dir={precision}", *[f"--config={i}" for i in items])
        weights = folder / precision / "export" / "model.safetensors"
        hashes[f"student: {precision}"] = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    return hashes


def main() -> int:
    from tests.tiny import make_corpus, make_teacher  # noqa: PLC0415 (not where another tree's losses are hashed)

    commit = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        archive = folder / "tree.tar"
        subprocess.run(["git", "-C", str(ROOT), "archive", "-o", str(archive), commit], check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "tree", filter="data")
        make_corpus(folder / "corpus")
        texts = [path.read_text() for path in sorted((folder / "corpus").iterdir())]
        make_teacher(folder / "teacher", texts)
        before = tree_hashes(folder / "tree", folder, folder / "before")
        after = tree_hashes(ROOT, folder, folder / "after")
    changed = [name for name in before if before[name] != after.get(name)]
    for name in changed:
        print(f"{name:60} {before[name]} -> {after.get(name)}")
    print(f"{len(before)} hashes of {commit} (of {len(after)} here), {len(changed)} of them differ here")
    return 1 if changed else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--losses"]:
        print(json.dumps(loss_hashes()))
    else:
        sys.exit(main())
