"""Where a cache of ours meets Transformers' attention.

attention.py   the attention and mask functions registered as "wildcat"
marks.py       how they find the cache layer: marks on tensors and lengths
pattern.py     which tokens a mask function lets a query see
keyword.py     the name of the cache argument, which changes between releases
"""

from wildcat_kv.hook import attention as attention  # registers "wildcat" with Transformers
