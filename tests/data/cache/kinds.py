"""Every kind of cache: what is kept, and how it is coded."""

from data.cache.selection import Selection

KINDS = {
    "top-k, standard": (Selection(top_k=8), "standard"),
    "top-k, compact": (Selection(top_k=9), "compact"),
    "top-k, lossless": (Selection(top_k=8), "lossless"),
    "top-1": (Selection(top_k=1), "standard"),
    "threshold": (Selection(top_k=20, min_prob=0.02), "standard"),
    "threshold, lossless": (Selection(top_k=20, min_prob=0.02), "lossless"),
    "nucleus": (Selection(top_k=30, mass=0.9), "standard"),
    "samples": (Selection(top_k=0, draws=6), "standard"),
    "many samples, lossless": (Selection(top_k=0, draws=300), "lossless"),
    "samples of a flatter proposal": (Selection(top_k=0, draws=6, proposal_temperature=1.5), "standard"),
    "head and samples": (Selection(top_k=4, draws=5), "compact"),
    "ragged head and samples": (Selection(top_k=12, mass=0.8, draws=5, proposal_temperature=0.8), "standard"),
    "tempered tails": (Selection(top_k=8, tail_temperatures=(0.5, 2.0)), "standard"),
    "tempered tails, lossless": (Selection(top_k=8, draws=2, tail_temperatures=(4.0,)), "lossless"),
}
