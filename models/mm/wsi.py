# SPDX-License-Identifier: Apache-2.0
"""Whole slides: classification and survival with their losses.

This file needs the extra wsi, so that only the configs of slides import it, beside `vssm.models.mm`. Its data set is in
`wsi_data`, its metrics and tables of predictions in `wsi_metrics`.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..mil import checkpoint_filter_fn, create_mil_model, current_name
from ..mil.survival import cox_loss, risk_score, survival, survival_nll
from .classification import NamedModel
from .utils import RunError, check_init
from .wsi_data import SlideDataset, list_bags
from .wsi_metrics import ConcordanceIndex, PredictionsHook, SlideAccuracy

__all__ = [
    'ConcordanceIndex',
    'PredictionsHook',
    'SlideAccuracy',
    'SlideClassifier',
    'SlideDataset',
    'SlideSurvival',
    'list_bags',
]


class SlideModel(NamedModel):
    """A network of `vssm.models.mil` on a batch of bags, one bag after the other.

    Args:
        model_name: Name for `create_mil_model`.
        data_preprocessor: Module, or its config, that moves a batch to the device; mmengine's BaseDataPreprocessor
            unless given.
        init_cfg: Config of a file to start from, dict(type='Pretrained', checkpoint=FILE), see `read_checkpoint`.
        model_args: Further keyword arguments of `create_mil_model`, such as in_dim and num_classes.
    """

    def __init__(
        self,
        model_name: str,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        init_cfg: dict[str, Any] | None = None,
        **model_args: Any,
    ) -> None:
        check_init(type(self).__name__, False, init_cfg)
        model = create_mil_model(model_name, **model_args)
        super().__init__(current_name(model_name) or '', model, model_args, data_preprocessor, init_cfg)

    @property
    def heads(self) -> tuple[str, ...]:
        return self.model.heads

    def is_named(self, name: str) -> bool:
        return current_name(name) == self.model_name

    def rename(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return checkpoint_filter_fn(state_dict, self.model)

    def forward(
        self,
        inputs: Sequence[dict[str, Any]],
        data_samples: Sequence[dict[str, Any]] | None = None,
        mode: str = 'tensor',
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Any]]:
        """Logits, the loss, or one prediction per bag.

        Args:
            inputs: The inputs of each bag, as SlideDataset gives them.
            data_samples: The data samples of each bag, as SlideDataset gives them; the mode 'tensor' needs none.
            mode: 'tensor', 'loss' or 'predict'.

        Returns:
            Logits, (batch, num_classes); or the parts of the loss; or for each bag a dictionary.

        Raises:
            RunError: A bag is unfit for the network; the message names it.
        """
        outputs, parts = [], []
        for i, bag in enumerate(inputs):
            try:
                if mode == 'loss':
                    output, of_bag = self.model.forward_train(**bag)
                    parts.append(of_bag)
                else:
                    output = self.model(**bag)
            except ValueError as error:
                raise RunError(f'{data_samples[i]["name"] if data_samples else f"bag {i}"}: {error}') from error
            outputs.append(output)
        logits = torch.cat(outputs)  # [batch, num_classes]
        if mode == 'tensor':
            return logits
        samples = cast(Sequence[dict[str, Any]], data_samples)  # logits alone need none
        if mode == 'loss':
            losses = self.loss(logits, samples)
            of_parts = [sample for sample, of_bag in zip(samples, parts, strict=True) for _ in of_bag]
            if of_parts:  # each of which has the label of its bag
                losses |= {f'{name}_parts': loss for name, loss in self.loss(torch.cat(parts), of_parts).items()}
            return losses
        if mode == 'predict':
            return self.predict(logits.float(), samples)
        raise ValueError(f"{type(self).__name__}: mode must be 'tensor', 'loss' or 'predict', got {mode!r}.")

    def loss(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The parts of the loss of a batch."""
        raise NotImplementedError

    def predict(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One prediction for each bag."""
        raise NotImplementedError


def _column(data_samples: Sequence[dict[str, Any]], key: str, like: Tensor) -> Tensor:
    return torch.tensor([sample[key] for sample in data_samples], device=like.device)


@MODELS.register_module()
class SlideClassifier(SlideModel):
    """A SlideModel with a cross-entropy loss, in which slides have the weights that their samples may have.

    It predicts dict(name, case, label, scores, loss) for each slide, scores being probabilities.
    """

    def _losses(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> Tensor:
        losses = F.cross_entropy(logits, _column(data_samples, 'label', logits), reduction='none')  # [batch]
        if 'weight' in data_samples[0]:
            # Not cross_entropy's own weights: their sum, by which it divides, takes them back from a batch of one.
            losses = losses * _column(data_samples, 'weight', logits)
        return losses

    def loss(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return dict(loss_cls=self._losses(logits, data_samples).mean())

    def predict(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        columns = (logits.softmax(1).tolist(), self._losses(logits, data_samples).tolist())
        return [
            dict(name=sample['name'], case=sample['case'], label=sample['label'], scores=scores, loss=loss)
            for sample, scores, loss in zip(data_samples, *columns, strict=True)
        ]


@MODELS.register_module()
class SlideSurvival(SlideModel):
    """A SlideModel with a survival loss.

    It predicts dict(name, months, censored, risk) for each case; with 'nll' also `survival`, the probability to survive
    each time bin, and `loss`, where the bin of the case is known.

    Args:
        args: Arguments of SlideModel.
        loss: 'nll', the discrete-time likelihood, with a class for each time bin; or 'cox', with one output, over the
            cases of a batch, of which there must be two or more.
        alpha: Share of their weight that censored cases lose in the loss 'nll'; at 1 they do not count.
        kwargs: Keyword arguments of SlideModel.
    """

    def __init__(self, *args: Any, loss: str = 'nll', alpha: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        outputs = self.model.num_classes
        if loss not in ('nll', 'cox') or (loss == 'cox') != (outputs == 1):
            raise ValueError(
                f"SlideSurvival: loss must be 'nll', with num_classes time bins, or 'cox', with num_classes=1; got "
                f'{loss!r} and {outputs}.'
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f'SlideSurvival: alpha must be within 0 and 1, got {alpha!r}.')
        self.loss_name = loss
        self.alpha = alpha

    def loss(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        logits, censored = logits.float(), _column(data_samples, 'censored', logits)
        if self.loss_name == 'nll':
            return dict(loss_nll=survival_nll(logits, _column(data_samples, 'bin', logits), censored, self.alpha))
        if len(logits) < 2:
            raise RunError(
                f'the Cox loss compares the cases of a batch, of which there must be two or more, got {len(logits)}: '
                'set train_dataloader.batch_size and drop_last=True.'
            )
        return dict(loss_cox=cox_loss(logits, _column(data_samples, 'months', logits), censored))

    def predict(self, logits: Tensor, data_samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        outputs = []
        for sample, own in zip(data_samples, logits.split(1), strict=True):
            output = dict(
                name=sample['name'], months=sample['months'], censored=sample['censored'], risk=risk_score(own).item()
            )
            if self.loss_name == 'nll':
                output['survival'] = survival(own)[0].tolist()
                if 'bin' in sample:
                    output['loss'] = self.loss(own, [sample])['loss_nll'].item()
            outputs.append(output)
        return outputs
