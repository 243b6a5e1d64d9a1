"""The rule whether weights fit a model."""

from __future__ import annotations

import torch
from torch import nn

from mmcls_involution.weights.fit import Fit


def fit_of(model: nn.Module) -> Fit:
    return Fit(model.state_dict(keep_vars=True))


def test_before_loading_everything_is_compared():
    model = nn.Linear(3, 2)
    weights = dict(weight=torch.rand(3, 3), other=torch.rand(1))
    assert fit_of(model).differences(weights) == (['bias'], ['other'], ['weight'])


def test_what_a_module_does_as_it_loads_counts():
    class Padded(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            theirs = state_dict[f'{prefix}weight']
            state_dict[f'{prefix}weight'] = nn.functional.pad(theirs, (0, 1))
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = Padded(3, 2)
    fit = fit_of(model)
    weights = dict(weight=torch.rand(2, 2), bias=torch.rand(2))
    model.load_state_dict(weights)
    assert fit.empty == [] and fit.differences(weights) == ([], [], [])


def test_equal_values_count_as_loaded():
    model = nn.Linear(3, 2)
    fit = fit_of(model)
    assert fit.empty == ['weight', 'bias']
    model.load_state_dict({'bias': model.bias.clone()}, strict=False)
    assert fit.empty == ['weight']


def test_models_made_in_inference_mode_are_compared_by_name_and_shape():
    with torch.inference_mode():
        fit = fit_of(nn.Linear(3, 2))
        weights = dict(weight=torch.rand(3, 3))
        assert fit.differences(weights) == (['bias'], [], ['weight'])
        assert fit.empty == []  # nobody can tell
