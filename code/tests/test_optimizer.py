"""SGD and its learning rate against torch's scheduler and against the update written out."""

import pytest
import torch

from model.simsiam import SimSiam
from optimizer.sgd import lr_schedule, make_adamw, make_sgd, set_learning_rates
from runtime.options import get_config


def test_lr_schedule_equals_torch_cosine():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for step in range(51):
        assert lr_schedule(step / 50, 0, 0.3) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_lr_schedule_with_warmup_is_linear_then_cosine():
    rates = [lr_schedule(epoch / 10, 0.2, 1.0) for epoch in range(11)]
    assert rates[:3] == pytest.approx([0, 0.5, 1])
    assert rates[6] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0)


def test_sgd_step_equals_formula_with_decay_on_all():
    """The update v = momentum v + g + wd w; w = w - lr v, by hand, with the predictor's own rate; BN and biases too."""
    torch.manual_seed(0)
    model = SimSiam(get_config(preset='demo', proj_dim=8, pred_dim=4)).double()
    optimizer = make_sgd(model, momentum=0.9, weight_decay=0.1)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    velocity = dict.fromkeys(wanted, 0)
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(wanted)
    for rate, predictor_rate in ((0.5, 0.5), (0.2, 0.5), (0.0, 0.5)):
        set_learning_rates(optimizer, rate, rate, predictor_rate)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            velocity[name] = 0.9 * velocity[name] + parameter.grad + 0.1 * wanted[name]
            wanted[name] = wanted[name] - (predictor_rate if name.startswith('predictor') else rate) * velocity[name]
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('make', [lambda model: make_sgd(model, 0.9, 1e-4), lambda model: make_adamw(model, 1e-4)])
def test_param_groups_hold_every_parameter_once(make):
    model = SimSiam(get_config(preset='demo', proj_dim=8, pred_dim=4))
    optimizer = make(model)
    set_learning_rates(optimizer, 0.1, 0.1, 0.2)
    assert [group['lr'] for group in optimizer.param_groups] == [0.1, 0.1, 0.2]
    found = [[id(value) for value in group['params']] for group in optimizer.param_groups]
    assert found == [[id(value) for value in part.parameters()] for part in model.children()]
    assert len({*sum(found, [])}) == len([*model.parameters()])
