"""The image modes by name: how a model sees a picture or a video.

    square     the picture resized to one view (CLIP: its centre)
    pad        made square with the mean colour first (LLaVA-1.5)
    tiles      stretched to the best of `grids` and cut into that many views; with every connector
    anyres     LLaVA-NeXT's: resized into the best of `grids` in its own proportions, with black
               borders. The borders' tokens are taken out again, and a learnt separator ends each
               row of tokens (connectors.py)
    anyres_max LLaVA-OneVision's: anyres, made smaller where the tiles' tokens are more than those
               of `max_views` views. Several pictures of a conversation are padded and have one view
               each; frames of a video have a quarter of the tokens
    split      SmolVLM's and Idefics3's: the longest edge resized to `edge`, then both edges to
               whole views. Between the tiles stand tokens of text that say their row and column;
               the whole picture comes last
    split_nanovlm  nanoVLM's: both edges resized to whole views, the longest one to `edge` at most.
               The whole picture comes first, resized in float32
    native     SigLIP2-NaFlex's: one view in the picture's own proportions

In all modes but native a view is a square. A new mode is a file like tiling_native.py, and one
entry here.
"""

from inputs.tiling import PaddedTiling, TilesTiling, Tiling
from inputs.tiling_anyres import AnyresMaxTiling, AnyresTiling
from inputs.tiling_native import NativeTiling
from inputs.tiling_split import NanoTiling, SplitTiling

# Keyed by the mode's name in a recipe and in config.json.
MODES: dict[str, type[Tiling]] = {
    "square": Tiling,
    "pad": PaddedTiling,
    "tiles": TilesTiling,
    "anyres": AnyresTiling,
    "anyres_max": AnyresMaxTiling,
    "split": SplitTiling,
    "split_nanovlm": NanoTiling,
    "native": NativeTiling,
}
