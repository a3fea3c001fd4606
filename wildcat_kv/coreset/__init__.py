"""The paper, in plain tensors: WildCat, arXiv 2602.10056. Imports torch alone, and Triton in its kernels for GPUs.

Read `reference.py` first: the whole paper for one head in plain float64 lines. The fast versions match it numerically.

    RPNYS        rpnys.py and its pivots.py, rpnys_blocked.py for large ranks
    COMPRESSKV   compresskv.py, for all bins at once binned.py and bins.py
    WTDATTN      wtdattn.py, fused.py; parts.py, quantised.py, groups.py for entries in a few bits; decoding.py on GPUs
    tau          temperature.py
    guarantee    guarantee.py, with its proof
    randomness   draws.py from noise.py
    on GPUs      launching.py, kernels/
    helpers      tensors.py, tokens.py, slot_facts.py, choices.py
"""
