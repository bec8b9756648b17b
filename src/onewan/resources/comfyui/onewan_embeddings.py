"""A ComfyUI node that makes embeddings work in prompts for Wan; for ComfyUI/custom_nodes.

ComfyUI replaces ``embedding:NAME`` in a prompt by the vectors in models/embeddings/NAME.safetensors
where the tokenizer of the text encoder knows that folder. It does not pass the folder on to Wan's
tokenizer (UMT5-XXL), which therefore encodes the name as ordinary words. The node returns the text
encoder with the folder set: connect it between the node that loads the text encoder (CLIP) and
those that encode prompts. One output may serve any number of prompts.

Installed by copying this file, which is all it needs; `onewan comfyui-node COMFYUI` does that.
"""

from __future__ import annotations

import copy

EMBEDDING_KEY = "umt5xxl"
"""ComfyUI's name of UMT5-XXL: that of a tokenizer for it, and the key in embedding files."""


def with_embeddings(tokenizer, folders):
    """A copy of ComfyUI's `tokenizer` that finds embeddings in `folders`.

    ValueError if the tokenizer is not one for UMT5-XXL, which the vectors were trained for.
    """
    tokenizer = copy.copy(tokenizer)
    parts = {
        name: copy.copy(part)
        for name, part in vars(tokenizer).items()
        if getattr(part, "embedding_key", None) == EMBEDDING_KEY
    }
    if not parts:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a tokenizer for UMT5-XXL; connect the text encoder "
            "of Wan (Load CLIP with type wan)"
        )
    for name, part in parts.items():
        part.embedding_directory = list(folders)
        setattr(tokenizer, name, part)
    return tokenizer


class OnewanEmbeddings:
    """Text encoder of Wan -> the same text encoder, with embeddings in its prompts."""

    CATEGORY = "conditioning"
    DESCRIPTION = "Makes embedding:NAME work in prompts for Wan (files in models/embeddings)."
    FUNCTION = "enable"
    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {"required": {"clip": ("CLIP",)}}

    def enable(self, clip):
        # Imported here, so that the rest of the file can be used without ComfyUI.
        import folder_paths  # pyright: ignore[reportMissingImports]

        # Copies, since ComfyUI keeps the loaded text encoder for other workflows.
        clip = clip.clone()
        folders = folder_paths.get_folder_paths("embeddings")
        clip.tokenizer = with_embeddings(clip.tokenizer, folders)
        return (clip,)


NODE_CLASS_MAPPINGS = {"OnewanEmbeddings": OnewanEmbeddings}
NODE_DISPLAY_NAME_MAPPINGS = {"OnewanEmbeddings": "Wan Embeddings (onewan)"}
