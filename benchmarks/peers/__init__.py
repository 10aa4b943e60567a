"""Losses of other projects, typed anew from their formulas, to be timed beside ours.

Each function takes `Inputs` and returns the mean loss. What a project does to memory (logits of all positions or
chunks, what it recomputes, in which precision it adds up) is kept, for that is what is compared; tensor parallelism,
temperature (1 here) and metrics are left out, so that a peer is at most as slow here as it is at home.

`tests/benchmarks/test_peers.py` holds each one's value and gradient against the combination that it is in our terms:

| module | function | objective in our terms | logits |
|---|---|---|---|
| `nemo.py` | `aligner`, `rl` | `renormalized` | all |
| | `aligner_with_rest` | `tail_bucket` | all |
| | `rl_zero_outside` | `truncated` | all, log-softmax in chunks |
| `distillkit.py` | `zero` | `truncated` | all |
| | `symmetric_uniform` | `tail_bucket` | all |
| `axolotl.py` | `forward_kl` | `truncated` | all, in float32 |
| | `chunked` | `renormalized` | chunks of 1,024, gradient in the forward pass |
| `verl.py` | `fsdp` | `unnormalized` | all |
| | `veomni` | `unnormalized` | chunks of 1,024, again in the backward pass |
| `megatron.py` | `ghost_token` | `tail_bucket` | all, in float32, and their log-softmax |
| `trl.py` | `chunked_tail` | `tail_bucket` | chunks of 256, again in the backward pass |
| | `server_tail` | `tail_bucket` | all, in float32 |
| | `dense_teacher` | `uniform_tail` | all, and the teacher's |

`installed.py` calls Liger-Kernel and TRL themselves, where they can be imported.
"""
