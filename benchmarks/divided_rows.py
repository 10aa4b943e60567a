"""What a transformer block keeps for its backward pass, by the ranks that divide a row by position.

    python -m benchmarks.divided_rows [--ranks 1 2 4] [--length 1024]

Counts bytes on each rank, in bfloat16, of one block of a 1B student (Llama 3.2's sizes) and one row of one document or
of eight. Nothing is timed. Parameters are not counted, and a tensor that several operations keep counts once.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from kd_core.document_lengths import Documents
from kd_core.files import read_json, write_json
from kd_core.parallel.config import Parallel
from kd_core.parallel.world import World
from kd_core.row_shares import DividedDocuments
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import meta_decoder
from kd_core.students.student import allocate

ARCH = Architecture(
    vocab_size=64, hidden_size=2048, intermediate_size=8192, num_layers=1, num_heads=32, num_kv_heads=8, head_dim=64,
    rope_theta=5e5, norm_eps=1e-5, tie_embeddings=True, max_positions=131072,
)  # fmt: skip


def kept_bytes(world: World, length: int, documents: int) -> int:
    """Bytes that the block keeps on this rank."""
    world = world.with_layout(Parallel(context_parallel=world.size).layout(world.size))
    # Parameters as FSDP gathers them.
    model = allocate(meta_decoder(ARCH), torch.device("cpu"), torch.bfloat16)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.arange(length)[None] // (length // documents)
    share = replace(world.row_share, rows=1)
    own = Documents.from_ids(ids)
    context = model.context(
        share.cut(torch.arange(length)[None] % (length // documents)),
        DividedDocuments.from_documents(own, share) if share.size > 1 else own,
    )
    x = torch.randn(1, length // share.size, ARCH.hidden_size, requires_grad=True)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        model.run_block(0, x, context)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in parameters)


def _rank(rank: int, size: int, folder: str, length: int, documents: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    write_json(Path(folder) / f"{rank}.json", {"bytes": kept_bytes(World(rank, size), length, documents)})
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def fullest(size: int, length: int, documents: int) -> int:
    """Bytes on the rank that keeps most."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (size, folder, length, documents), nprocs=size)
        return max(read_json(Path(folder) / f"{rank}.json", "a count")["bytes"] for rank in range(size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    rows = 4 * ARCH.num_kv_heads * ARCH.head_dim * args.length
    print(f"torch {torch.__version__}; keys and values of a whole row: {rows / 1e6:.1f} MB")
    print("| documents of the row | ranks | MB that the fullest rank keeps of a block | of one rank's |")
    print("|---|---|---|---|")
    for documents in (1, 8):
        alone = fullest(1, args.length, documents)
        for size in args.ranks:
            found = fullest(size, args.length, documents)
            print(f"| {documents} | {size} | {found / 1e6:.1f} | {found / alone:.3f} |", flush=True)


if __name__ == "__main__":
    main()
