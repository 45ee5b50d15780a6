"""Makes a torchvision wheel built for CUDA importable beside a torch for CPUs. Run once in vLLM's own environment:

    .venv-vllm/bin/python recipes/vllm/mend_torchvision.py

Such a wheel cannot load its compiled operators here, and stops at import where it describes two of them. Nothing in
this recipe calls them; it is enough that their names are known before torchvision is imported. A `.pth` file sees to
that in every process of the environment, those that vLLM starts included.
"""

import sysconfig
from pathlib import Path

MODULE = '''"""Names of two torchvision operators, without the operators."""
import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''

if __name__ == "__main__":
    folder = Path(sysconfig.get_path("purelib"))
    (folder / "torchvision_names.py").write_text(MODULE)
    (folder / "torchvision_names.pth").write_text("import torchvision_names\n")
    print(f"written: {folder / 'torchvision_names.pth'}")
