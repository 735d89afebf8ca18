"""A Llama whose layers lie in parts on several processes, beside a whole one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvalg import Problem, parse
from tests.support.models.torchvision import make_importable
from tests.support.sharded_models import vector

TERMS = ("hessian", "ggn", "covariance", "2*hessian + ggn - 3*covariance + 0.001*identity")


def llama() -> nn.Module:
    """Grouped queries: two heads of keys for four of queries; the embedding is the head."""
    make_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double().eval()


def _texts() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, 23, (7, 6), generator=generator)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in texts.split(3)]


def _logits(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0], use_cache=False).logits.transpose(1, 2)


def _cut(model: Any, mesh: Any, kind: str) -> nn.Module:
    if kind in ("tensor", "both"):
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        names = {
            "q_proj": "self_attn",
            "k_proj": "self_attn",
            "v_proj": "self_attn",
            "gate_proj": "mlp",
            "up_proj": "mlp",
        }
        plan: dict[str, Any] = {f"model.layers.*.{part}.{name}": ColwiseParallel() for name, part in names.items()}
        plan |= {
            "model.layers.*.self_attn.o_proj": RowwiseParallel(),
            "model.layers.*.mlp.down_proj": RowwiseParallel(),
        }
        model = parallelize_module(model, mesh if kind == "tensor" else mesh["tensor"], plan)
    if kind in ("data", "both"):
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh if kind == "data" else mesh["data"])
        model = fully_shard(model, mesh=mesh if kind == "data" else mesh["data"])
    return model


def errors_of_products(group: Any, kind: str) -> dict[str, float]:
    """Errors of this process's numbers, relative to the whole vectors."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_default_dtype(torch.float64)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    mesh: Any = group
    if kind == "both":
        mesh = DeviceMesh("cpu", torch.arange(size).reshape(2, size // 2), mesh_dim_names=("data", "tensor"))
    elif kind != "parameters":
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(kind,))
    batches, loss = _texts(), nn.CrossEntropyLoss()
    whole = Problem(llama(), loss, batches, forward=_logits)
    parts = {"tensor": 1, "both": 2}.get(kind, size)
    place = rank // (size // parts) if parts > 1 else 0
    own = batches[place::parts]
    shard = "parameters" if kind == "parameters" else None
    problem = Problem(_cut(llama(), mesh, kind), loss, own, forward=_logits, group=mesh, shard=shard)
    index = problem.layout.places()
    wanted, v = whole.gradient(), vector(whole.size)
    found = {"gradient": float((problem.gradient() - wanted[index]).norm() / wanted.norm())}
    for text in TERMS:
        got, right = parse(text).lower(problem) @ v[index], parse(text).lower(whole) @ v
        found[text] = float((got - right[index]).norm() / right.norm())
    return found
