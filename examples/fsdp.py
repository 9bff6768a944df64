# SPDX-License-Identifier: Apache-2.0
"""Train the classifier of a config with PyTorch's FSDP2: every process keeps its share of the weights, of their
gradients and of the optimizer's moments, and gathers the weights of a block when the block computes. On eight GPUs:

    config=imagenet/vmamba_base_8xb128-300e_in1k
    torchrun --standalone --nproc-per-node 8 examples/fsdp.py $config --data-root DIR
    vssm test $config work_dirs/$config/checkpoint.safetensors --data-root DIR

Samples, losses, rates and steps are those of `vssm train` on as many processes. Left out are the evaluation, which
`vssm test` does on the weights that are written after every epoch, and the custom_hooks: mmengine's moving average
(EMAHook, which MESAHook needs) deep-copies the model, and a sharded one cannot be. So a recipe with EMA, such as
ImageNet's, ends in its last weights, not in their average. --resume goes on from the work dir's resume.pt; gradients
accumulated at an epoch's end are lost to it.

Tried on CPUs only, by gloo with two processes, as the config digits/vmamba2d_test has it; not run on a GPU.
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import all_reduce
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from vssm.models.files import replacing
from vssm.models.mm import GuardedDataset, RunError, note_images, save_for_timm
from vssm.models.mm.utils import mix_seeds, seed_everything
from vssm.tools._common import UsageError, add_run_arguments, read_config


def build_dataloader(cfg: Config, device: str) -> DataLoader:
    """This process's part of the training data; as in `vssm train`, a sample is the same whoever makes it."""
    loader = cfg.train_dataloader
    loader.dataset = GuardedDataset(DATASETS.build(loader.dataset), skip=cfg.get('unreadable') == 'skip')
    loader.sampler = dict(type='SeededSampler', sampler=loader.sampler)
    loader.pin_memory = device == 'cuda'
    return Runner.build_dataloader(loader, seed=cfg.randomness.seed)


def build_model(cfg: Config, device: str) -> nn.Module:
    """The ImageClassifier, sharded over all processes."""
    seed_everything(cfg.randomness.seed)  # the same weights everywhere, of which each process then keeps its share
    classifier = MODELS.build(cfg.model)
    classifier.init_weights()
    classifier.to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for stage in classifier.model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(classifier, mesh=mesh)  # the modules outside the blocks: stem, downsampling, head


def build_schedulers(cfg: Config, optimizer: Optimizer, epoch_length: int) -> list:
    """The schedulers of the config, which end with the training unless they say when."""
    epochs, schedulers = cfg.train_cfg.max_epochs, []
    for scheduler in cfg.param_scheduler:
        end = epochs if scheduler.get('by_epoch', True) else epochs * epoch_length
        defaults = dict(optimizer=optimizer, epoch_length=epoch_length, end=end)
        schedulers.append(PARAM_SCHEDULERS.build(scheduler, default_args=defaults))
    return schedulers


def save(
    folder: Path, epoch: int, classifier: nn.Module, optimizer: Optimizer, schedulers: list, notes: dict[str, str]
) -> None:
    """Write checkpoint.safetensors for timm and `vssm test`, and resume.pt; each appears as a whole."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(classifier, optimizer, options=options)  # all send, the first process receives
    if dist.get_rank() != 0:
        return
    network = {name.removeprefix('model.'): value for name, value in weights.items()}
    save_for_timm(folder / 'checkpoint.safetensors', classifier, network, epoch, **notes)
    # The weights again: a run that is killed between the two files must not mix two epochs.
    state = dict(epoch=epoch, weights=weights, moments=moments, schedulers=[s.state_dict() for s in schedulers])
    with replacing(folder / 'resume.pt') as temporary:
        torch.save(state, temporary)


def resume(folder: Path, classifier: nn.Module, optimizer: Optimizer, schedulers: list) -> int:
    """Load what `save` wrote, for any number of processes, and return how many epochs are done."""
    state = torch.load(folder / 'resume.pt', map_location='cpu', weights_only=True)
    tensors = dict(model_state_dict=state['weights'], optim_state_dict=state['moments'])
    set_state_dict(classifier, optimizer, **tensors, options=StateDictOptions(full_state_dict=True))
    for scheduler, values in zip(schedulers, state['schedulers'], strict=True):
        scheduler.load_state_dict(values)
    return state['epoch']


def train(cfg: Config, folder: Path, device: str, resumes: bool) -> None:
    loader = build_dataloader(cfg, device)
    classifier = build_model(cfg, device)
    # After the sharding, for the shards are what it steps. BFloat16OptimWrapper's autocast works as ever; FSDP's own
    # MixedPrecisionPolicy would send half the bytes, but also round what autocast leaves alone, such as the scan's A.
    optim_wrapper = build_optim_wrapper(classifier, cfg.optim_wrapper)
    optimizer = optim_wrapper.optimizer
    schedulers = build_schedulers(cfg, optimizer, len(loader))
    start, end, length = 0, cfg.train_cfg.max_epochs, len(loader)
    if resumes and (folder / 'resume.pt').is_file():
        start = resume(folder, classifier, optimizer, schedulers)
    notes = note_images(DATASETS.build(cfg.val_dataloader.dataset), classifier)  # for `vssm predict`
    optim_wrapper.initialize_count_status(classifier, start * length, end * length)  # to accumulate gradients

    for epoch in range(start, end):
        loader.sampler.set_epoch(epoch)
        for i, batch in enumerate(loader):
            seed_everything(mix_seeds(cfg.randomness.seed, dist.get_rank(), epoch * length + i))  # see SeedHook
            rate, last = max(group['lr'] for group in optimizer.param_groups), i + 1 == length
            # Forward, backward, clipping by the norm over all shards, step. It calls the classifier as a module, never
            # its forward(): FSDP gathers the weights in hooks.
            loss = classifier.train_step(batch, optim_wrapper)['loss'].detach()
            for scheduler in schedulers:
                if last or not scheduler.by_epoch:
                    scheduler.step()
            if last or (i + 1) % cfg.default_hooks.logger.interval == 0:
                all_reduce(loss, 'mean')
                if not math.isfinite(loss):  # in all processes alike, and before anything is saved
                    raise RunError(f'the loss is {loss.item()} in epoch {epoch + 1}, iteration {i + 1}.')
                if dist.get_rank() == 0:
                    print(f'epoch {epoch + 1}/{end}  {i + 1}/{length}  loss {loss:.4f}  lr {rate:.2e}', flush=True)
        save(folder, epoch + 1, classifier, optimizer, schedulers, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', help='name, as in `vssm configs`, or path of a config')
    add_run_arguments(parser)  # --launcher has no effect: it is torchrun
    parser.add_argument('--resume', action='store_true', help='go on from resume.pt in the work dir, if there is one')
    args = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error('start it by torchrun: torchrun --standalone --nproc-per-node N examples/fsdp.py CONFIG')
    try:
        cfg = read_config(args)
    except UsageError as error:
        parser.error(str(error))
    if cfg.model.type != 'ImageClassifier':
        parser.error(f'CONFIG must be one of an ImageClassifier, got one of a {cfg.model.type}.')

    device = cfg.get('device', 'cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda':
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
    folder = Path(cfg.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train(cfg, folder, device, args.resume)
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
