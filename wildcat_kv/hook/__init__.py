"""Hook into Transformers' attention.

attention.py   the attention and mask functions registered as "wildcat"
marks.py       marks on tensors and lengths, which lead to the cache layer
pattern.py     comparison of a mask with the causal one
keyword.py     name of the cache argument, which differs between releases
"""

from wildcat_kv.hook import attention as attention  # registers "wildcat" with Transformers
