"""`exitwise align` in two processes whose policy FSDP2 shards, on CPUs: python -m tests.sharded OUT ARGUMENTS...

`accelerate launch` turns sharding on for accelerators only; on CPUs it quietly trains unsharded. So its state is
told here that it shards, as a configuration file tells it on GPUs; preparing, gathering and saving are its own code.
Both processes are forks of one, because importing torch twice is what takes long.
"""

import os
import socket
import sys
import traceback

import accelerate
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from exitwise.alignment.loop import align  # noqa: F401 (before the fork)
from exitwise.cli.main import entry


class ShardingAccelerator(accelerate.Accelerator):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        self.state.distributed_type = DistributedType.FSDP
        accelerate.PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as AcceleratorState does


def main(out: str, arguments: list[str]) -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
            accelerate.Accelerator = ShardingAccelerator
            try:
                entry(["align", *arguments, "--out", out, "--device", "cpu", "--debug"])
            except BaseException as error:
                if not isinstance(error, SystemExit) or error.code:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
