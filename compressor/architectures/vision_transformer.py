"""A small vision transformer: attention between patches of the image, without convolutions.

Source: Dosovitskiy et al., "An image is worth 16x16 words: transformers for image recognition at
scale" (ICLR 2021), with a class token, learned positions and normalisation before each part. It
computes what torchvision's `VisionTransformer` does, whose images are square and of three
channels. Deviation: every weight starts normal with a variance of one over the number of its
inputs, the head's too: a head of zeros would hide the gradient from the first attack, and the
usual standard deviation of 0.02 is for Adam (by SGD, on the digits, 65 % of 200 held-out images
were right after 30 epochs, and 96 % with this).

N images, C channels, H and W pixels, T tokens (the class token and the patches), D features of a
token, A heads of E features each, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.architectures.parts import has_imagenet_stem, scale_channels
from compressor.errors import RecipeError

TOKEN_FEATURES = 192
NUM_HEADS, NUM_BLOCKS, MLP_FACTOR = 3, 6, 4
SMALL_PATCH, LARGE_PATCH = 4, 16
"""Pixels: up to the size that has the stem of CIFAR networks, and above."""
_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Every token looks at all tokens; the heads have a third of the features each, rounded."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.head_features = max(1, round(features / NUM_HEADS))
        inner = NUM_HEADS * self.head_features
        self.qkv = nn.Linear(features, 3 * inner)
        self.out = nn.Linear(inner, features)

    def forward(self, tokens_NTD: Tensor) -> Tensor:
        """Tokens [N, T, D]."""
        qkv_NT3AE = self.qkv(tokens_NTD).unflatten(2, (3, NUM_HEADS, self.head_features))
        qkv_3NATE = qkv_NT3AE.permute(2, 0, 3, 1, 4)
        mixed_NATE = F.scaled_dot_product_attention(qkv_3NATE[0], qkv_3NATE[1], qkv_3NATE[2])
        return self.out(mixed_NATE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention, then two layers on each token by itself; both are added to what was there."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features, eps=_NORM_EPS)
        self.attention = Attention(features)
        self.norm2 = nn.LayerNorm(features, eps=_NORM_EPS)
        self.fc1 = nn.Linear(features, MLP_FACTOR * features)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(MLP_FACTOR * features, features)

    def forward(self, tokens_NTD: Tensor) -> Tensor:
        """Tokens [N, T, D]."""
        tokens_NTD = tokens_NTD + self.attention(self.norm1(tokens_NTD))
        return tokens_NTD + self.fc2(self.gelu(self.fc1(self.norm2(tokens_NTD))))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Patches become tokens; the class token, after all blocks, decides."""

    def __init__(
        self, *, features: int, patch: int, num_classes: int, image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        num_tokens = 1 + (height // patch) * (width // patch)
        self.patches = nn.Conv2d(channels, features, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, features))
        self.positions = nn.Parameter(torch.zeros(1, num_tokens, features))
        self.blocks = nn.Sequential(*(TransformerBlock(features) for _ in range(NUM_BLOCKS)))
        self.norm = nn.LayerNorm(features, eps=_NORM_EPS)
        self.fc = nn.Linear(features, num_classes)
        self._initialise()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N, K]."""
        patches_NTD = self.patches(x_NCHW).flatten(2).transpose(1, 2)
        class_N1D = self.class_token.expand(x_NCHW.shape[0], -1, -1)
        tokens_NTD = torch.cat([class_N1D, patches_NTD], dim=1) + self.positions
        tokens_NTD = self.norm(self.blocks(tokens_NTD))
        return self.fc(tokens_NTD[:, 0])  # type: ignore[no-any-return]

    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)


def build_vit_6_192(
    *, num_classes: int, image_shape: tuple[int, int, int], width: float
) -> nn.Module:
    """Six blocks of 192 features and three heads; 2,693,578 parameters at 10 classes and 3x32x32.

    Raises:
        RecipeError: if the images cannot be cut into whole patches.
    """
    patch = LARGE_PATCH if has_imagenet_stem(image_shape) else SMALL_PATCH
    if image_shape[1] % patch or image_shape[2] % patch:
        smaller, larger = (patch * max(1, min(image_shape[1:]) // patch + up) for up in (0, 1))
        raise RecipeError(
            f"vit_6_192 cuts images into patches of {patch}x{patch} pixels, and "
            f"{'x'.join(map(str, image_shape))} (channels, height, width) leaves a rest; set "
            f"data.image_size = {smaller} or {larger} (for a teacher: resize_to), or use another "
            "network"
        )
    return VisionTransformer(
        features=scale_channels(TOKEN_FEATURES, width),
        patch=patch,
        num_classes=num_classes,
        image_shape=image_shape,
    )
