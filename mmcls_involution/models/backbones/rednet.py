"""RedNet: ResNet with involutions in place of its 3x3 convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.fx
import torch.utils.checkpoint as cp
from mmcv.cnn import ConvModule, build_conv_layer, build_norm_layer
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit, Sequential, constant_init
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmcls_involution.ops import transforms
from mmcls_involution.ops.checks import check_input, check_positive
from mmcls_involution.ops.geometry import memory_format
from mmcls_involution.ops.kernels import CopiesOfBuffers
from mmcls_involution.weights.fit import Fit, Misfit, grow_kernels

from ..layers import Involution2d


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module):
    """`function(x)`, run again in the backward pass instead of kept; it uses `module`.

    Unlike a bare checkpoint, this updates running statistics once.
    """
    options = {}
    # A compiler knows no such contexts, and itself writes no statistics twice.
    if not torch.compiler.is_compiling():
        options['context_fn'] = lambda: (nullcontext(), CopiesOfBuffers(module))
    return cp.checkpoint(
        function,
        x,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a stem or a block is random
        **options,
    )


# All three are nodes of torch.fx's graphs, whose proxies have no shape and lie nowhere
# in memory. Of tensors under torch.func's vmap it cannot be asked where they lie.
torch.fx.wrap('check_input')


@torch.fx.wrap
def _own_layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if transforms.active() else memory_format(x)


@torch.fx.wrap
def _in_fast_layout(x: Tensor) -> Tensor:
    # A CPU is faster in channels_last memory, the way back included
    # (docs/benchmarks.md). Necks and heads gain nothing from such features, users'
    # views of them would fail, and a compiled mmcv's RoIAlign reads them wrongly.
    if x.device.type != 'cpu' or transforms.active():
        return x
    return x.contiguous(memory_format=torch.channels_last)


class Bottleneck(BaseModule):
    """ResNet's bottleneck with an involution in place of the 3x3 convolution.

    Args:
        in_channels (int): Input channels.
        out_channels (int): Output channels, four times the middle ones.
        stride (int): Stride of the block. Defaults to 1.
        dilation (int): Dilation of the involution. Defaults to 1.
        downsample (nn.Module, optional): Applied to the shortcut.
            Defaults to None.
        style (str): ``'pytorch'`` or ``'caffe'``: whether the involution or the
            first 1x1 convolution carries the stride. Defaults to ``'pytorch'``.
        with_cp (bool): Recompute the block in the backward pass instead of keeping
            its activations. Defaults to False.
        conv_cfg (dict, optional): Config of the convolutions. Defaults to None.
        norm_cfg (dict, optional): Config of the norm layers. Defaults to None: BN.
        involution_cfg (dict, optional): Arguments of :class:`Involution2d`.
            Defaults to None: its defaults.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        style: str = 'pytorch',
        with_cp: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        involution_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        norm_cfg = norm_cfg or dict(type='BN')
        channels = out_channels // self.expansion
        conv_stride, involution_stride = (
            (1, stride) if style == 'pytorch' else (stride, 1)
        )
        self.conv1 = build_conv_layer(
            conv_cfg, in_channels, channels, 1, stride=conv_stride, bias=False
        )
        self.bn1 = build_norm_layer(norm_cfg, channels)[1]
        self.conv2 = Involution2d(
            channels,
            stride=involution_stride,
            dilation=dilation,
            **(involution_cfg or {}),
        )
        self.bn2 = build_norm_layer(norm_cfg, channels)[1]
        self.conv3 = build_conv_layer(conv_cfg, channels, out_channels, 1, bias=False)
        self.bn3 = build_norm_layer(norm_cfg, out_channels)[1]
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.with_cp = with_cp

    def _residual(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.conv3(out)  # on a line of its own: its input is free before bn3 runs
        out = self.bn3(out)
        out += x if self.downsample is None else self.downsample(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, ceil(H/s), ceil(W/s)]."""
        if self.with_cp and x.requires_grad:
            out = _recomputed(self._residual, x, self)
        else:
            out = self._residual(x)
        return self.relu(out)


def _make_stage(
    num_blocks: int,
    in_channels: int,
    out_channels: int,
    stride: int,
    avg_down: bool,
    conv_cfg: dict | None,
    norm_cfg: dict,
    **kwargs,
) -> Sequential:
    """Bottlenecks of one resolution; the first one changes size and channels."""
    downsample = None
    if stride != 1 or in_channels != out_channels:
        pool = avg_down and stride != 1
        layers = [
            build_conv_layer(
                conv_cfg,
                in_channels,
                out_channels,
                1,
                stride=1 if pool else stride,
                bias=False,
            ),
            build_norm_layer(norm_cfg, out_channels)[1],
        ]
        if pool:
            layers.insert(
                0,
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
            )
        downsample = nn.Sequential(*layers)
    kwargs.update(conv_cfg=conv_cfg, norm_cfg=norm_cfg)
    first = Bottleneck(
        in_channels, out_channels, stride=stride, downsample=downsample, **kwargs
    )
    rest = (
        Bottleneck(out_channels, out_channels, **kwargs) for _ in range(num_blocks - 1)
    )
    return Sequential(first, *rest)


@MODELS.register_module()
class RedNet(BaseModule):
    """RedNet backbone.

    Section 4.1 of `Involution: Inverting the Inherence of Convolution for Visual
    Recognition <https://arxiv.org/abs/2103.06255>`_: ResNet with bottlenecks whose
    3x3 convolution is a 7x7 involution, behind a stem of 3x3 convolution, involution
    and 3x3 convolution. Any input size works. Arguments are those of MMPretrain's
    ResNet; parameter names are those of the official RedNet, whose checkpoints load
    as they are.

    Args:
        depth (int): One of 26, 38, 50, 101 and 152.
        in_channels (int): Channels of the image. Defaults to 3.
        stem_channels (int): Output channels of the stem. Defaults to 64.
        base_channels (int): Middle channels of the first stage. Defaults to 64.
        num_stages (int): Number of stages, 1 to 4. Defaults to 4.
        strides (Sequence[int]): Stride of each stage. Defaults to (1, 2, 2, 2).
        dilations (Sequence[int]): Dilation of each stage's involutions.
            Defaults to (1, 1, 1, 1).
        out_indices (Sequence[int]): Stages to return, counted from 0.
            Defaults to (3,).
        style (str): ``'pytorch'`` puts a block's stride into its involution,
            ``'caffe'`` into its first 1x1 convolution. Defaults to ``'pytorch'``.
        avg_down (bool): Downsample shortcuts by average pooling instead of a
            strided convolution. Defaults to False.
        frozen_stages (int): Stages to freeze (no gradients, eval mode): -1 none,
            0 the stem, n the stem and the first n stages. Defaults to -1.
        stem_kernel_size (int, optional): Kernel size of the stem's involution. The
            official ImageNet models have 3, the official detection and segmentation
            backbones 7. None puts a 3x3 convolution in its place, which makes the stem
            that of MMPretrain's ResNet with ``deep_stem``. Defaults to 3.
        involution_cfg (dict, optional): Arguments of :class:`Involution2d` for every
            involution; ``kernel_size`` is that of the bottlenecks, ``norm_cfg`` also
            that of the norm layer behind the stem's involution. Defaults to None:
            kernel_size 7, group_channels 16, reduction_ratio 4, and ``norm_cfg`` as
            below. (The official code keeps plain BN there whatever norm_cfg says.)
        conv_cfg (dict, optional): Config of the convolutions. Defaults to None.
        norm_cfg (dict, optional): Config of the norm layers.
            Defaults to None: ``dict(type='BN', requires_grad=True)``.
        norm_eval (bool): Keep the running statistics of batch norm layers fixed in
            training. Defaults to False.
        with_cp (bool): Recompute stem and blocks in the backward pass to save memory.
            Defaults to False.
        zero_init_residual (bool): Start every block as the identity.
            Defaults to True.
        init_cfg (dict | list[dict], optional): Initialization. Defaults to None:
            Kaiming for convolutions, 1 for norm layers.

    Raises:
        ValueError: If an argument is out of range, or (Misfit, a ValueError) a
            checkpoint for another stem is loaded.

    Example:
        >>> import torch
        >>> from mmcls_involution.models import RedNet
        >>> model = RedNet(depth=26, out_indices=(0, 1, 2, 3)).eval()
        >>> for level in model(torch.rand(1, 3, 65, 47)):
        ...     print(tuple(level.shape))
        (1, 256, 17, 12)
        (1, 512, 9, 6)
        (1, 1024, 5, 3)
        (1, 2048, 3, 2)
    """

    arch_settings = {
        26: (1, 2, 4, 1),
        38: (2, 3, 5, 2),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
    }

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        stem_channels: int = 64,
        base_channels: int = 64,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (3,),
        style: str = 'pytorch',
        avg_down: bool = False,
        frozen_stages: int = -1,
        stem_kernel_size: int | None = 3,
        involution_cfg: dict | None = None,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        norm_eval: bool = False,
        with_cp: bool = False,
        zero_init_residual: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if depth not in self.arch_settings:
            raise ValueError(
                f'depth must be one of {list(self.arch_settings)}, got {depth!r}'
            )
        if num_stages not in (1, 2, 3, 4):
            raise ValueError(f'num_stages must be 1, 2, 3 or 4, got {num_stages}')
        numbers = dict(
            in_channels=in_channels,
            stem_channels=stem_channels,
            base_channels=base_channels,
        )
        for name, values in (('strides', strides), ('dilations', dilations)):
            if not isinstance(values, Sequence) or len(values) != num_stages:
                raise ValueError(
                    f'{name} must have one entry per stage, {num_stages}, got '
                    f'{values!r}'
                )
            numbers |= {f'{name}[{i}]': value for i, value in enumerate(values)}
        check_positive(numbers)
        if (
            not isinstance(out_indices, Sequence)
            or not out_indices
            or any(index not in range(num_stages) for index in out_indices)
        ):
            raise ValueError(
                f'out_indices must name stages from 0 to {num_stages - 1}, '
                f'got {out_indices!r}'
            )
        if style not in ('pytorch', 'caffe'):
            raise ValueError(f"style must be 'pytorch' or 'caffe', got {style!r}")
        if frozen_stages not in range(-1, num_stages + 1):
            raise ValueError(
                f'frozen_stages must be -1 to {num_stages}, got {frozen_stages}'
            )
        if stem_channels % 2:
            raise ValueError(f'stem_channels must be even, got {stem_channels}')
        super().__init__(
            init_cfg
            or [
                dict(type='Kaiming', layer='Conv2d'),
                dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
            ]
        )
        self.depth = depth
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.zero_init_residual = zero_init_residual
        norm_cfg = norm_cfg or dict(type='BN', requires_grad=True)
        involution_cfg = dict(dict(norm_cfg=norm_cfg), **(involution_cfg or {}))

        half = stem_channels // 2
        stem_cfg = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg)
        if stem_kernel_size is None:
            middle = build_conv_layer(conv_cfg, half, half, 3, padding=1, bias=False)
        else:
            cfg = {**involution_cfg, 'kernel_size': stem_kernel_size}
            middle = Involution2d(half, **cfg)
        self.stem = nn.Sequential(
            ConvModule(in_channels, half, 3, stride=2, padding=1, **stem_cfg),
            middle,
            build_norm_layer(involution_cfg['norm_cfg'], half)[1],
            nn.ReLU(inplace=True),
            ConvModule(half, stem_channels, 3, padding=1, **stem_cfg),
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.res_layers = []
        in_channels, out_channels = stem_channels, base_channels * Bottleneck.expansion
        for i, num_blocks in enumerate(self.arch_settings[depth][:num_stages]):
            name = f'layer{i + 1}'
            stage = _make_stage(
                num_blocks,
                in_channels,
                out_channels,
                stride=strides[i],
                avg_down=avg_down,
                conv_cfg=conv_cfg,
                norm_cfg=norm_cfg,
                dilation=dilations[i],
                style=style,
                with_cp=with_cp,
                involution_cfg=involution_cfg,
            )
            self.add_module(name, stage)
            self.res_layers.append(name)
            in_channels, out_channels = out_channels, 2 * out_channels
        self._freeze_stages()

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        for name in ['stem', *self.res_layers[: self.frozen_stages]]:
            stage = getattr(self, name)
            stage.eval()
            stage.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialize as ``init_cfg`` says.

        Raises:
            Misfit: If a ``Pretrained`` checkpoint holds no weights of RedNet.
        """
        if self.is_init:
            return super().init_weights()  # which does nothing and says so
        fit = Fit(dict(self.named_parameters()))
        super().init_weights()
        cfgs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg]
        for cfg in cfgs:
            kind = cfg['type']  # a class, or a name that may have a scope
            if kind is not PretrainedInit and not str(kind).endswith('Pretrained'):
                continue
            if 'stem.0.conv.weight' in fit.empty:  # ResNets have a layer1 too
                raise Misfit(
                    f'{cfg["checkpoint"]} holds no weights of RedNet under the prefix '
                    f"{cfg.get('prefix')!r}; the names must begin with 'stem.' after "
                    "it. A classifier's checkpoint needs init_cfg=dict(..., "
                    "prefix='backbone.')"
                )
            return None
        for module in self.modules():
            if self.zero_init_residual and isinstance(module, Bottleneck):
                constant_init(module.bn3, 0)
        if isinstance(self.stem[1], Involution2d):
            self.stem[1].init_weights()
        return None

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        self._grow_kernels(state_dict, prefix)
        # MMEngine would log what does not fit, skip it and train on.
        for name, module in self.named_modules(prefix=prefix.removesuffix('.')):
            stem = name == f'{prefix}stem.1'  # a convolution or an involution
            if not (stem or isinstance(module, Involution2d)):
                continue
            ours = dict(module.named_parameters(prefix=name))
            # Convolutions' weights: norm layers may be fused into them.
            theirs = {
                key: value
                for key, value in state_dict.items()
                if key.startswith(f'{name}.') and value.dim() == 4
            }
            _, unknown, reshaped = Fit(ours).differences(theirs)
            if other := [*(unknown if stem else ()), *reshaped]:
                key = other[0]
                here = tuple(ours[key].shape) if key in ours else 'absent'
                raise Misfit(
                    f'{key} is {tuple(theirs[key].shape)} in the checkpoint and {here} '
                    f'in the model: their {"stem " if stem else ""}involutions differ. '
                    'A larger kernel_size takes the weights of a smaller one, and not '
                    'the other way round; the official ImageNet models have '
                    'stem_kernel_size=3, the official detection and segmentation '
                    'backbones 7. Set the one of your weights, and involution_cfg '
                    'where they were trained with another'
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _grow_kernels(self, state_dict: dict, prefix: str) -> None:
        """Let involutions take weights of smaller kernels than theirs."""
        grown = {}
        for name, module in self.named_modules():
            if not isinstance(module, Involution2d) or 'conv2' not in module._modules:
                continue
            for key, ours in module.conv2.named_parameters(prefix=f'{name}.conv2'):
                theirs = state_dict.get(prefix + key)
                if theirs is None or theirs.shape[1:] != ours.shape[1:]:
                    continue
                groups = module.channels // module.group_channels
                state_dict[prefix + key] = larger = grow_kernels(
                    theirs, groups, module.kernel_size
                )
                if larger is not theirs:
                    sizes = len(theirs) / len(larger)
                    size = round(module.kernel_size * sizes**0.5)
                    grown[name] = f'{size} into {module.kernel_size}'
        if grown:
            print_log(
                f'RedNet: smaller kernels laid into larger ones ('
                f'{", ".join(sorted(set(grown.values())))}), zeros around them, in '
                f'{", ".join([*grown][:3])}{", ..." if len(grown) > 3 else ""}. It '
                'computes what it did',
                logger='current',
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the stages in ``out_indices``.

        Args:
            x (Tensor): Images ``[N, in_channels, H, W]``.

        Returns:
            tuple[Tensor]: Stage i has ``base_channels * 4 * 2**i`` channels and, with
            the default strides, 1 / ``4 * 2**i`` of the image's size, rounded up. They
            lie in memory as the images do.

        Raises:
            ValueError: If ``x`` is no batch of images, or not of floats.
        """
        check_input(x)
        layout = _own_layout(x)
        x = _in_fast_layout(x)
        if self.with_cp and torch.is_grad_enabled():
            x = _recomputed(self._stem, x, self.stem)
        else:
            x = self._stem(x)
        outs = []
        for i, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outs.append(x)
        # Not earlier, when a level is an input still and would be there twice.
        for i, level in enumerate(outs):
            outs[i] = level.contiguous(memory_format=layout)
        return tuple(outs)

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.stem(x))

    def train(self, mode: bool = True) -> RedNet:
        """Set the mode, but for what is frozen and for norm_eval's batch norms."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
