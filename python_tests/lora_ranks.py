"""A rank of test_lora's run on two processes: segment adapters under DDP and FSDP2 against one process, where no rank
has samples of every segment."""

import sys

import torch
import torch.distributed as dist
from helpers import model_inputs, randn, tiny_model
from peft import LoraConfig
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flexdit_ext import DensitySchedule, lora
from flexdit_ext.blocks import Block


def adapted_model():
    model = tiny_model(torch.float64, schedule=DensitySchedule([(4, 4), (3, 2), (2, 2)]))
    adapted = lora.add_segment_adapters(model, LoraConfig(r=2))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * randn(*parameter.shape, seed=i))
    return adapted


def gradients(model, x, t, y):
    model(x, t, y).square().mean().backward()
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in named.items()}


def main():
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
    x, _, y = model_inputs(adapted_model().config, 4, torch.float64)
    t = torch.tensor([10, 400, 20, 999])  # segments 0 and 1 on one rank, 0 and 2 on the other
    expected = gradients(adapted_model(), x, t, y)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    sharded = adapted_model()
    base = sharded.get_base_model()
    for block in [module for module in base.modules() if isinstance(module, Block)]:
        fully_shard(block)
    fully_shard(base)
    for model in (DistributedDataParallel(adapted_model()), sharded):
        actual = gradients(model, x[mine], t[mine], y[mine])
        assert actual.keys() == expected.keys()
        for name, grad in actual.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
