"""What a notebook costs, told by its own kernel; nothing heavy is imported here, for every kernel starts with it."""
import json
import os
import re
import sys
from pathlib import Path

# what papermill's kernel runs before the first cell, without leaving a name behind
STARTUP = "__import__('lib.cost', fromlist=['watch']).watch()"


def watch() -> None:
    """Write `used()` to the file $REPRO_COST after every cell of the running kernel."""
    from IPython import get_ipython
    file = Path(os.environ["REPRO_COST"])
    get_ipython().events.register("post_execute", lambda: file.write_text(json.dumps(used())))


def used() -> dict:
    """What this process has used so far: cpu_seconds (children included), peak_memory_mib (resident; None where the
    system does not tell), and where torch has computed on a GPU its name, gpu, and gpu_memory_mib (peak allocated)."""
    status = Path("/proc/self/status")          # getrusage would start at the peak of the process that forked this one
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    cost = {"cpu_seconds": round(sum(os.times()[:4]), 1), "peak_memory_mib": int(peak[1]) // 1024 if peak else None}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        cost |= {"gpu": torch.cuda.get_device_name(), "gpu_memory_mib": torch.cuda.max_memory_allocated() // 2**20}
    return cost


def told(record: dict) -> str:
    """The cost of a run or of a sweep in words, from its manifest: seconds of GPU or CPU, memory, machine."""
    seconds, memory = record["seconds"], record.get("peak_memory_mib")
    if "gpu" in record:
        return f"{seconds:,.0f} GPU seconds on {record['gpu']}, {record['gpu_memory_mib']:,} MiB of it ({record['machine']})"
    cpu = f"{record['cpu_seconds']:,.0f} CPU seconds" if record.get("cpu_seconds") else f"{seconds:,.0f} s"
    return f"{cpu}{f', {memory:,} MiB' if memory else ''} on {record['machine']}"
