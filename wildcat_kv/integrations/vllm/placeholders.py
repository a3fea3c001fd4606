"""Token ids that stand for a context in a prompt.

An engine hashes a prompt's ids to find what it has computed already. So the first ids spell the context's digest,
its number of slots and a check: contexts never share a prefix, and text spells none of them by accident.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

DIGEST_BYTES = 24
_COUNT_BYTES = 4
_CHECK_BYTES = 4
_BYTES = DIGEST_BYTES + _COUNT_BYTES + _CHECK_BYTES
# The id behind those that spell.
_FILL = 0


def spelling_length(vocabulary: int) -> int:
    """Count the ids that spell a context: the fewest slots that a context may have.

    Args:
        vocabulary: number of token ids, at least 2.
    """
    most, count = 1 << (8 * _BYTES), 0
    while most > 1:
        most, count = -(-most // vocabulary), count + 1
    return count


def placeholder_ids(digest: bytes, slots: int, vocabulary: int) -> list[int]:
    """Make the ids of a context.

    Args:
        digest: digest of the context, 24 bytes.
        slots: number of ids.
        vocabulary: number of token ids of the model.

    Raises:
        ValueError: the slots are too few to spell the digest.
    """
    length = spelling_length(vocabulary)
    if slots < length:
        raise ValueError(
            f"slots={slots} are too few for a context in a vocabulary of {vocabulary} tokens, which needs {length}; "
            "keep more of the text"
        )
    count = slots.to_bytes(_COUNT_BYTES, "big")
    number, ids = int.from_bytes(digest + count + _check(digest + count), "big"), []
    for _ in range(length):
        number, digit = divmod(number, vocabulary)
        ids.append(digit)
    return ids + [_FILL] * (slots - length)


def read_placeholder(ids: Sequence[int], vocabulary: int) -> tuple[bytes, int] | None:
    """Read the digest and the number of slots that a prompt begins with; None for a prompt of text.

    Args:
        ids: ids of the prompt.
        vocabulary: number of token ids of the model.
    """
    length, number = spelling_length(vocabulary), 0
    if len(ids) < length:
        return None
    for digit in reversed(ids[:length]):
        number = number * vocabulary + digit
    if number >> (8 * _BYTES):
        return None
    spelt = number.to_bytes(_BYTES, "big")
    told, check = spelt[:-_CHECK_BYTES], spelt[-_CHECK_BYTES:]
    if check != _check(told):
        return None
    return told[:DIGEST_BYTES], int.from_bytes(told[DIGEST_BYTES:], "big")


def _check(told: bytes) -> bytes:
    return hashlib.sha256(b"wildcat_kv context" + told).digest()[:_CHECK_BYTES]
