"""Does vLLM score a teacher as our decoder does, in this process and behind servers, and at what speed?

Command:  python -m benchmarks.vllm_scorer quickstart/teacher quickstart/corpus [entries=URL] [pooling=URL]
Run it where vLLM is installed. Servers are started before, with the same folder and --dtype float32: one with
--max-logprobs 64, one with --runner pooling (docs/vllm.md). All score the same 8 rows in float32, one of them short.
Prints the largest |Δ| in nats against our decoder, of the top 64's log-probabilities by id, of the label and of the
tail by its size, then seconds and ratios.
"""

import sys
import time
from pathlib import Path

import torch

from data.cache.selection import Selection
from data.teacher.choose_scorer import load_scorer
from data.teacher.scorer import AnyScorer, TeacherScores, score_rows
from data.teacher.vllm_settings import VllmSettings, installed_release
from data.tokenizer import Tokenizer

TAILS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 0.0)
CPU, ROWS, LENGTH = torch.device("cpu"), 8, 255


def read_rows(teacher: Path, corpus: Path, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns tokens [B, T + 1] of the first texts, and document ids [B, T]. The last row is half as long."""
    tokenizer, found = Tokenizer(teacher), list[list[int]]()
    for path in sorted(corpus.iterdir()):
        ids = tokenizer.encode([path.read_text()[: 8 * length]])[0]
        if len(ids) > length:
            found.append([*tokenizer.default_around.begins, *ids][: length + 1])
    tokens = torch.tensor(found[:rows])
    documents = torch.arange(len(tokens))[:, None].repeat(1, length)
    documents[-1, length // 2 :] = -1
    return tokens, documents


def score(scorer: AnyScorer, tokens: torch.Tensor, documents: torch.Tensor, top_k: int) -> tuple[TeacherScores, float]:
    """Scores all rows twice, and returns the second scores of real positions with their seconds."""
    uniforms = torch.zeros(documents.numel(), 0)
    score_rows(scorer, tokens[-1:], documents[-1:], Selection(top_k), uniforms)
    start = time.perf_counter()
    scores = score_rows(scorer, tokens, documents, Selection(top_k), uniforms)
    seconds = time.perf_counter() - start
    real = (documents >= 0).flatten()
    return TeacherScores(*(field[real] for field in scores)), seconds


def largest_difference(ours: TeacherScores, theirs: TeacherScores) -> tuple[float, float]:
    """Returns the largest |Δ| of log-probabilities of ids that both have, and the share of ids that both have."""
    # Line both up by id: entry j of ours meets the entries of theirs with the same id.  [n, K, K]
    same = ours.ids[:, :, None] == theirs.ids[:, None, :]
    delta = (ours.log_probs[:, :, None] - theirs.log_probs[:, None, :]).abs()
    return float(delta[same].max()), float(same.any(dim=2).float().mean())


def print_differences(name: str, ours: TeacherScores, theirs: TeacherScores) -> None:
    delta, shared = largest_difference(ours, theirs)
    label = float((ours.label_log_prob - theirs.label_log_prob).abs().max())
    print(f"{name}: top 64 {delta:.1e}, label {label:.1e} nats; {100 * shared:.3f}% of the ids in both")
    tail, error = ours.tail_log_prob.exp(), (ours.tail_log_prob - theirs.tail_log_prob).abs()
    mass = (theirs.tail_log_prob.double().exp() - ours.tail_log_prob.double().exp()).abs()
    for upper, lower in zip((1.0, *TAILS), TAILS, strict=False):
        within = (tail > lower) & (tail <= upper)
        if within.any():
            print(
                f"  tail {lower:.0e} to {upper:.0e}: {int(within.sum())} positions, |Δ log| at most "
                f"{float(error[within].max()):.1e}, median {float(error[within].median()):.1e} nats, "
                f"|Δ mass| at most {float(mass[within].max()):.1e}"
            )


def main() -> None:
    teacher, corpus = Path(sys.argv[1]), Path(sys.argv[2])
    urls = dict(argument.split("=", 1) for argument in sys.argv[3:])
    tokens, documents = read_rows(teacher, corpus, ROWS, LENGTH)
    threads = torch.get_num_threads()
    print(
        f"{installed_release()}, torch {torch.__version__}, {threads} threads, {int((documents >= 0).sum())} positions"
    )
    decoder, seconds = score(load_scorer(teacher, "decoder", torch.float32, CPU), tokens, documents, 64)
    settings = {"in process": VllmSettings({"max_model_len": LENGTH})}
    if "pooling" in urls:
        settings["hidden states of a server"] = VllmSettings({"runner": "pooling"}, urls["pooling"])
    if "entries" in urls:
        settings["entries of a server"] = VllmSettings({}, urls["entries"])
    print(f"decoder: {seconds:.1f} s, {len(decoder.ids) / seconds:.0f} tokens/s")
    for name, chosen in settings.items():
        scores, taken = score(load_scorer(teacher, "vllm", torch.float32, CPU, chosen), tokens, documents, 64)
        print_differences(name, decoder, scores)
        print(f"  {taken:.1f} s, {len(scores.ids) / taken:.0f} tokens/s, {seconds / taken:.2f} times the decoder's")


if __name__ == "__main__":
    main()
