"""The CIFAR ResNet as an encoder that transformers can put before a decoder."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.resnet import ResNet

__all__ = ["KIND", "resnet_encoder"]

KIND = "offramp-resnet"


@cache
def resnet_encoder() -> tuple[Any, Any]:
    """(configuration, model) classes of transformers, which from then on knows the kind "offramp-resnet".

    The model gives the last map of a residual network of CIFAR's kind, averaged down to `grid` x `grid` places, and for
    each place its number as a vector of 0 and one 1: hidden states [batch grid*grid 64+grid*grid].
    """
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput

    class ResNetEncoderConfig(PretrainedConfig):  # type: ignore[misc]
        model_type = KIND

        def __init__(self, blocks: int = 3, grid: int = 4, **other: Any) -> None:
            self.blocks, self.grid, self.hidden_size = blocks, grid, 64 + grid**2
            other.pop("hidden_size", None)
            super().__init__(**other)

    class ResNetEncoder(PreTrainedModel):  # type: ignore[misc]
        config_class = ResNetEncoderConfig
        main_input_name = "pixel_values"
        _supports_sdpa = True  # it has no attention at all

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.network = ResNet(config.blocks)
            del self.network.linear  # it tells classes
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """The network has set its own."""

        def forward(self, pixel_values: Tensor, **_: Any) -> Any:
            net, grid = self.network, self.config.grid
            seen = net.layer3(net.layer2(net.layer1(F.relu(net.bn1(net.conv1(pixel_values))))))
            maps = F.adaptive_avg_pool2d(seen, grid).flatten(2).transpose(1, 2)
            places = torch.eye(grid**2, device=maps.device, dtype=maps.dtype)
            return BaseModelOutput(last_hidden_state=torch.cat([maps, places.expand(len(maps), -1, -1)], dim=2))

    AutoConfig.register(KIND, ResNetEncoderConfig)
    AutoModel.register(ResNetEncoderConfig, ResNetEncoder)
    return ResNetEncoderConfig, ResNetEncoder
