"""Quantizers of other projects at given bytes: Sony's MCT, NVIDIA's ModelOpt, and Brevitas, by their documented calls.

Each gets the float network and the calibration images that fxquant gets, quantizes the weights of every convolution
and linear layer per channel and their inputs to 8 bits, and yields simulated networks. None of the three writes a
file that holds weights below 8 bits at their own width, so bytes are counted, never less favourably than for fxquant:
weights at their width without a gap, one float32 scale per channel, scale and zero point of each layer's input, and
what else the float ONNX file holds with BatchNorm folded (float32 biases, graph). Quantize nodes count nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.padding import PaddedConv2d

WIDTHS = (2, 3, 4, 8)
"""Weight bits that searches choose from."""
UNIFORM_WIDTHS = (2, 3, 4, 5)
"""Weight bits of networks of one width."""
MIDDLE = 0.12
"""Share of the float file to begin with, and go away from, since the time of a peer is limited."""
LARGE = 1_000_000
"""Weights from which on roundings get fewer images, and training fewer epochs."""
ROUNDING_IMAGES = 32
"""Images that Brevitas rounds a large network with, since it runs the network again for each layer."""
MARGIN = 0.02
"""How far outside of the asked shares of the float file a network of one width may lie."""


class Stored(NamedTuple):
    """What one layer leaves on disk: bits of a weight, weights, output channels."""

    bits: int
    weights: int
    channels: int


@dataclass(frozen=True)
class Job:
    """What a peer works on.

    Args:
        factory: builds the float network in eval mode.
        images: calibration images `(N, C, H, W)`.
        ratios: bytes of the files that are asked for, over those of the float file.
        float_bytes: bytes of the float ONNX file.
    """

    factory: Callable[[], nn.Module]
    images: Tensor
    ratios: tuple[float, ...]
    float_bytes: int

    def network(self) -> nn.Module:
        """Return the network with torch's own layers only, which peers find by their type."""
        model = self.factory().eval()
        _replace_padded(model)
        return model

    def layers(self, bits: int) -> list[Stored]:
        """Return all layers at one width."""
        found = [each.weight for each in self.network().modules() if isinstance(each, nn.Conv2d | nn.Linear)]
        return [Stored(bits, weight.numel(), len(weight)) for weight in found]

    @property
    def weights(self) -> int:
        """Weights of all layers."""
        return sum(each.weights for each in self.layers(8))

    def file_bytes(self, layers: Iterable[Stored]) -> int:
        """Return the bytes of a file with these layers: see the module's docstring."""
        stored = sum(-(-each.bits * each.weights // 8) + 4 * each.channels + 5 for each in layers)
        # The float file holds four vectors per BatchNorm, of which folding leaves a bias.
        norms = [each.num_features for each in self.network().modules() if isinstance(each, nn.BatchNorm2d)]
        return self.float_bytes - 4 * self.weights - 12 * sum(norms) + stored

    def weight_room(self, ratio: float) -> float:
        """Return the bytes that weights may take in a file of this share of the float file."""
        return ratio * self.float_bytes - self.file_bytes(self.layers(0))


Quantized = Iterator[tuple[str, nn.Module, list[Stored]]]
"""Name of the file, simulated network, its layers."""


def _replace_padded(module: nn.Module) -> None:
    for name, child in module.named_children():
        if not isinstance(child, PaddedConv2d):
            _replace_padded(child)
            continue
        sizes: Any = (child.kernel_size, child.stride, child.padding)
        kernel, stride, padding = sizes
        conv = nn.Conv2d(child.in_channels, child.out_channels, kernel, stride, padding, groups=child.groups)
        conv.load_state_dict(child.state_dict())
        setattr(module, name, conv if child.uneven is None else nn.Sequential(nn.ZeroPad2d(child.uneven), conv).eval())


def _uniform_widths(job: Job) -> list[int]:
    low, high = min(job.ratios) - MARGIN, max(job.ratios) + MARGIN
    ratios = {bits: job.file_bytes(job.layers(bits)) / job.float_bytes for bits in UNIFORM_WIDTHS}
    near = sorted(ratios, key=lambda bits: abs(ratios[bits] - MIDDLE))
    return [bits for bits in near if low < ratios[bits] < high]


def _budgets(job: Job) -> Iterator[tuple[float, float]]:
    """Yield each share that the candidate widths reach, and the bytes that weights may take."""
    weights = job.weights
    for ratio in sorted(job.ratios, key=lambda ratio: abs(ratio - MIDDLE)):
        room = job.weight_room(ratio)
        if not min(WIDTHS) <= 8 * room / weights <= max(WIDTHS):
            print(f"{ratio}: {8 * room / weights:.2f} bits per weight, outside of {WIDTHS}", file=sys.stderr)
            continue
        yield ratio, room


def _batches(images: Tensor) -> list[Tensor]:
    size = 32 if images.shape[-1] < 64 else 16
    return [images[first : first + size] for first in range(0, len(images), size)]


def brevitas(job: Job, rounding: str) -> Quantized:
    """Yield networks of one width, rounded by "gptq" or "qronos"; scales by mean square error, biases corrected.

    Inputs are quantized asymmetrically at the 99.999th percentile, its default.
    """
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common as ptq

    images = job.images[:ROUNDING_IMAGES] if job.weights > LARGE else job.images
    calibration, batches = ([(batch, None) for batch in _batches(each)] for each in (job.images, images))
    for bits in _uniform_widths(job):
        _, layer_map, _, _ = ptq.create_quant_maps(
            dtype=torch.float32,
            bias_bit_width=None,
            weight_bit_width=bits,
            weight_param_method="mse",
            weight_scale_type="float_scale",
            weight_quant_type="sym",
            weight_quant_granularity="per_channel",
            weight_narrow_range=False,
            weight_quant_format="int",
            act_quant_format="int",
            act_bit_width=8,
            act_scale_type="float_scale",
            act_scale_computation_type="static",
            act_param_method="stats",
            act_quant_type="asym",
            act_quant_granularity="per_tensor",
            act_quant_percentile=99.999,
        )
        # Its example turns ReLU6 into ReLU, which is another network; equalization would need that.
        model = preprocess_for_quantize(job.network(), relu6_to_relu=False)
        model = layerwise_quantize(model, compute_layer_map=layer_map)
        with torch.no_grad():
            # Scales of weights are set by the first images that pass outside of calibration.
            model(job.images[:2])
        ptq.calibrate(calibration, model)
        if rounding == "gptq":
            ptq.apply_gptq(batches, model, act_order=True)
        else:
            ptq.apply_qronos(model, batches, act_order=True)
        ptq.apply_bias_correction(calibration, model)
        yield str(bits), model, job.layers(bits)


def _modelopt_format(bits: int) -> dict[str, Any]:
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
        ],
        "algorithm": _MSE,
        "effective_bits": float(bits),
    }


_MSE = {"method": "mse", "step_size": 0.02, "start_multiplier": 0.2, "stop_multiplier": 1.1}


def modelopt(job: Job) -> Quantized:
    """Yield what `auto_quantize` chooses for each share, scored once by its gradient method, with no layer in float.

    It asks for a loss with labels; they are the float network's answers. Scales of weights by mean square error. Its
    other method, "kl_div", was worse on ResNet-20 at all shares: 61 in place of 86 % at .11.
    """
    import modelopt.torch.quantization as mtq

    model = job.network()
    with torch.no_grad():
        batches = [(images, model(images).argmax(dim=1)) for images in _batches(job.images)]
    budgets = [(ratio, {"effective_bits": 8 * room / job.weights}) for ratio, room in _budgets(job)]
    if not budgets:
        return
    formats = [_modelopt_format(bits) for bits in WIDTHS]
    space = {"module_name_patterns": ["*"], "quantization_formats": formats, "allow_no_quant": False}
    _, state = mtq.auto_quantize(
        model,
        constraints=budgets[0][1],
        quantization_formats=formats,
        module_search_spaces=[space],
        data_loader=batches,
        forward_step=lambda model, batch: model(batch[0]),
        loss_func=lambda answer, batch: F.cross_entropy(answer, batch[1]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )
    for ratio, budget in budgets:
        config = mtq.get_auto_quantize_config(state, budget)
        config["algorithm"] = _MSE
        chosen = mtq.quantize(job.network(), config, lambda model: [model(images) for images, _ in batches])
        quantized = [each for each in chosen.modules() if hasattr(each, "weight_quantizer")]
        yield (
            str(ratio),
            chosen,
            [
                Stored(
                    each.weight_quantizer.num_bits if each.weight_quantizer.is_enabled else 32,
                    each.weight.numel(),
                    len(each.weight),
                )
                for each in quantized
            ],
        )


def mct(job: Job, epochs: int) -> Quantized:
    """Yield what the integer program chooses for each share; `epochs` of its gradient rounding (0: none) follow.

    Its target description for the IMX500, with `WIDTHS` and uniform activation scales in place of powers of two.
    """
    import model_compression_toolkit as toolkit
    from mct_quantizers import PytorchQuantizationWrapper, QuantizationMethod
    from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc

    layer, _, other = tpc.get_op_quantization_configs()
    layer, other = (
        each.clone_and_edit(activation_quantization_method=QuantizationMethod.UNIFORM) for each in (layer, other)
    )
    kernel = tpc.KERNEL_ATTR
    choices = [layer.clone_and_edit(attr_to_edit={kernel: {tpc.WEIGHTS_N_BITS: bits}}) for bits in reversed(WIDTHS)]
    platform = tpc.generate_tpc(other, layer, choices, "W2348A8")

    def images() -> Iterator[list[Tensor]]:
        return ([batch] for batch in _batches(job.images))

    search = toolkit.core.MixedPrecisionQuantizationConfig(num_of_images=max(8, len(job.images) // 8))
    given: dict[str, Any] = {
        "core_config": toolkit.core.CoreConfig(mixed_precision_config=search),
        "target_platform_capabilities": platform,
    }
    for ratio, room in _budgets(job):
        given["target_resource_utilization"] = toolkit.core.ResourceUtilization(weights_memory=room)
        if epochs:
            training = toolkit.gptq.get_pytorch_gptq_config(
                n_epochs=epochs // 3 if job.weights > LARGE else epochs,
                use_hessian_based_weights=False,
                use_hessian_sample_attention=False,
            )
            chosen, _ = toolkit.gptq.pytorch_gradient_post_training_quantization(
                job.network(), images, gptq_config=training, **given
            )
        else:
            chosen, _ = toolkit.ptq.pytorch_post_training_quantization(job.network(), images, **given)
        layers = []
        for each in chosen.modules():
            if isinstance(each, PytorchQuantizationWrapper) and "weight" in each.weights_quantizers:
                weight = each.get_quantized_weights()["weight"]
                layers.append(Stored(each.weights_quantizers["weight"].num_bits, weight.numel(), len(weight)))
        yield str(ratio), chosen, layers


def let_torchvision_load() -> object:
    """Declare the two operators without which a torchvision of another build cannot be imported; keep the result."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        declare: Any = torch.library.Library
        library = declare("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        return library
    return None


PEERS: Mapping[str, tuple[tuple[str, ...], Callable[[Job], Quantized]]] = {
    "MCT": (("model_compression_toolkit", "torchvision"), partial(mct, epochs=0)),
    "MCT GPTQ": (("model_compression_toolkit", "torchvision"), partial(mct, epochs=30)),
    "ModelOpt": (("modelopt",), modelopt),
    "Brevitas GPTQ": (("brevitas", "brevitas_examples", "tqdm"), partial(brevitas, rounding="gptq")),
    "Brevitas Qronos": (("brevitas", "brevitas_examples", "tqdm"), partial(brevitas, rounding="qronos")),
}
"""Contestant -> packages it needs, what it does."""
