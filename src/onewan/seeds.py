"""Counter-based randomness: every draw has a name, so no random state passes from step to step.

A seed is a hash of (run seed, purpose, counters). A resumed run derives the seed of step 1200 from
the same name as the interrupted run did, and draws the same values, whatever was drawn before and
however many workers or processes there are.
"""

from __future__ import annotations

import hashlib

_SEPARATOR = "\x1f"
"""Between the parts of a name (ASCII unit separator), so that (1, 11) and (11, 1) differ."""


def derive_seed(run_seed: int, purpose: str, *counters: int | str) -> int:
    """A 63-bit seed for one named draw.

    `purpose` says what is drawn ("noise", "t", "order"); `counters` say which one (step, index in
    the global batch). 63 bits, since ``torch.Generator.manual_seed`` takes a signed 64-bit integer.
    """
    name = _SEPARATOR.join(str(part) for part in (run_seed, purpose, *counters))
    # File names that are not valid Unicode contain surrogates.
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
