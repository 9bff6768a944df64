# SPDX-License-Identifier: Apache-2.0
"""Published files and those of trainings, converted to safetensors under our names."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from ...version import __version__
from ..files import printable, replacing, state_of
from .checksum import write_safetensors
from .fit import misfits
from .identify import SHAPE_ARGS, SIZE_ARGS, identify, registered
from .read import read_checkpoint
from .rename import rename_fn, strip_prefixes

__all__ = ['Converted', 'convert', 'translate']


class Converted(NamedTuple):
    """What `convert` found.

    Args:
        metadata: The metadata of the new file.
        twins: Names of other models that have the same names and shapes.
        left_out: Names of the source's tensors that are not the network's, as those of necks, heads and counters.
    """

    metadata: dict[str, str]
    twins: list[str]
    left_out: list[str]


def convert(
    source: str | Path,
    target: str | Path,
    model: str | None = None,
    which: str = 'auto',
    origin: str | None = None,
) -> Converted:
    """Write the weights of a published file, or of a training's, as safetensors under our names.

    The metadata hold what rebuilds the network, `timm.create_model(model, checkpoint_path=target, **model_args)`;
    whether its weights are averaged ones; and the name and the sha256 of the source. The backbone of a detector or
    segmentor keeps its output norms, outnorm0 and on, which timm does not know; its model_args say features_only.

    Args:
        source: A file that `read_checkpoint` reads.
        target: A .safetensors file, replaced as a whole, with the permissions of the source.
        model: Name of one of our models that the file must hold, told by the file unless given.
        which: Kind of weights, 'auto', 'model' or 'model_ema', see `read_checkpoint`.
        origin: Name to note as the source, that of the file unless given.

    Raises:
        FileNotFoundError: The source or the folder of the target does not exist.
        ValueError: The source cannot be read or does not fit, or the target has another suffix.
        OSError: The target cannot be written.
    """
    source, target = Path(source), Path(target)
    if target.suffix != '.safetensors':
        raise ValueError(f'convert: target must end in .safetensors, got {target}.')
    if not target.parent.is_dir():
        raise FileNotFoundError(f'convert: the folder of target {target} {state_of(target.parent)}.')
    tensors, (metadata, twins, left_out) = translate(*read_checkpoint(source, which), source, model)
    with open(source, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    metadata.update(source=origin or source.name, sha256=digest, vssm=__version__)
    try:
        with replacing(target, like=source) as temporary:
            write_safetensors(temporary, tensors, metadata)
    except SafetensorError as error:  # as a full disk is reported
        raise OSError(f'{target} cannot be written: {error}') from error
    return Converted(metadata, twins, left_out)


def translate(
    tensors: dict[str, Tensor], metadata: dict[str, str], source: str | Path, model: str | None = None
) -> tuple[dict[str, Tensor], Converted]:
    """The weights of one of our networks under our names and in our shapes, and what builds the network.

    Args:
        tensors: What `read_checkpoint` found in a file.
        metadata: The metadata that it found there.
        source: The file, which an error names.
        model: Name of one of our models that it must be, told by the tensors unless given.

    Returns:
        Names and tensors; and what `convert` returns of them.

    Raises:
        ValueError: They are not those of one of our networks, or of another than `model`.
    """
    tensors, left_out = strip_prefixes(tensors)
    recorded = metadata.get('model')
    asked = model if model != recorded else None
    model = model or recorded
    name, args, twins = identify(tensors, model)
    if (
        asked and SIZE_ARGS & args.keys()
    ):  # it may be one of other sizes by intention, unless another name is that of these
        other, its_args, _ = identify(tensors)
        if not SIZE_ARGS & its_args.keys():
            raise ValueError(f'checkpoint {source} must hold {asked}, got the tensors of {other}.')
    if model == recorded:
        # The arguments that shapes do not tell, as the scan, the pooling and rates; the others are told by the tensors.
        untold = inspect.signature(type(registered(name))).parameters.keys() - SHAPE_ARGS
        try:
            noted = dict(json.loads(metadata.get('model_args', '{}')).items())
        except (AttributeError, RecursionError, ValueError) as error:
            raise ValueError(f'checkpoint {source} must note its model_args as a JSON object.') from error
        args |= {key: value for key, value in noted.items() if key in untold}
    metadata = dict(metadata, model=name, model_args=json.dumps(args))
    return _fit(tensors, name, args), Converted(metadata, twins, left_out)


def _fit(state_dict: dict[str, Tensor], model: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors under our names and in our shapes, of which each one has been checked."""
    network: Any  # timm's wrapper has attributes of its own with features_only
    try:
        network = timm.create_model(model, device='meta', **args) if args else registered(model)
    except Exception as error:  # any kind, as the arguments may be a file's
        raise ValueError(f'checkpoint must hold {model}, got one with {args}: {printable(str(error))}') from error
    features_only = args.get('features_only')
    backbone = network.model if features_only else network
    rename = rename_fn(model)
    sizes = {name: value.numel() for name, value in rename(state_dict, nn.Module()).items()}
    state_dict = rename(state_dict, backbone)
    own = backbone.state_dict()
    if features_only:
        for i, info in enumerate(network.feature_info):
            norm = nn.LayerNorm(info['num_chs'], device='meta').state_dict(prefix=f'outnorm{i}.')
            own.update((name, value) for name, value in norm.items() if name in state_dict)
    problems = misfits(state_dict, own)
    resampled = [name for name, value in state_dict.items() if sizes.get(name, value.numel()) != value.numel()]
    if resampled and not problems:  # as a network that is built for it may do, a file must not
        problems = f'{", ".join(resampled)} of another size'
    if problems:
        arguments = f' with {args}' if args else ''
        raise ValueError(
            f'checkpoint must hold the {len(own)} tensors of {model}{arguments}, got {len(state_dict)}: {problems}.'
        )
    return state_dict
