"""`entry_key`: under which name what was computed is kept."""

from __future__ import annotations

import hashlib
import json


def entry_key(**inputs: object) -> str:
    """The key of an entry: a hash of its inputs, which must be JSON values."""
    # Changing these options changes every key.
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # File names that are not valid Unicode contain surrogates.
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=20).hexdigest()
