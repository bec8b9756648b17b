"""Counted randomness: every draw has a name, so nothing random is ever carried from step to step.

A seed is a hash of (run seed, purpose, counters). A resumed run asks for step 1200 under the same
name as the run that was cut and gets the same numbers; the number of workers or processes, and what
was drawn before, make no difference.
"""

from __future__ import annotations

import hashlib


def derive_seed(run_seed: int, purpose: str, *counters: int | str) -> int:
    """A 63-bit seed for one named draw.

    `purpose` says what is drawn ("noise", "t", "order"); `counters` say which one (step, index in
    the global batch). 63 bits, since ``torch.Generator.manual_seed`` takes a signed 64-bit integer.
    """
    name = "\x1f".join(str(part) for part in (run_seed, purpose, *counters))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
