"""`Bucket`: the frames and the size that the clips of a batch share, as numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from onewan.variants import PATCH_SIZE, Variant


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Bucket:
    """Frames and size of the clips of a batch, or of a sample video."""

    frames: int
    """4n+1."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        """Of one frame."""
        return self.width * self.height

    def latent_frames(self, variant: Variant) -> int:
        return (self.frames - 1) // variant.temporal_compression + 1

    def latent_cells(self, variant: Variant) -> int:
        """Of all latent frames."""
        side = variant.spatial_compression
        return self.latent_frames(variant) * (self.width // side) * (self.height // side)

    def tokens(self, variant: Variant) -> int:
        """Tokens that the transformer gets for one clip, with those of a reference image."""
        frames = self.latent_frames(variant) + variant.reference_frames
        return frames * self.tokens_of_a_frame(variant)

    def tokens_of_a_frame(self, variant: Variant) -> int:
        _, rows, columns = PATCH_SIZE
        side = variant.spatial_compression
        return (self.height // side // rows) * (self.width // side // columns)
