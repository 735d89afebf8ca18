"""Numbers of curvature as tensors with gradients: to the parameters, dampings, priors and all that model and loss depend on.

Each value is that of an operator, and its gradient exact third-order reverse mode, computed when ``backward`` is called. A
gradient goes to every chosen parameter that requires one, and to every other tensor that does and that the model or the loss
depends on: parameters that were not chosen, class weights, a temperature, learned priors.

>>> import torch
>>> from curvalg import Problem, differentiable, registry
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
>>> problem = Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(8, 3), torch.randint(2, (8,))))
>>> prior = torch.tensor(0.1, requires_grad=True)
>>> evidence = differentiable.logdet(registry.build("ggn"), problem, damping=prior)
>>> evidence.backward()
>>> net[0].weight.grad.shape, prior.grad.shape
(torch.Size([4, 3]), torch.Size([]))
"""

from curvalg.differentiable.quantities import logdet, quadratic_form, tic, top_eigenvalue, trace

__all__ = ["logdet", "quadratic_form", "tic", "top_eigenvalue", "trace"]
