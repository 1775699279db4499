"""Big Transfer (BiT) from scratch: the package that the book of the same name derives, one module a chapter.

- bitlib.data, from chapters/01_data.py: Pictures in and out of the network, the upstream GlyphNet, and the downstream tasks.
- bitlib.norm, from chapters/02_group_normalization.py: Group Normalization, derived from its equation.
- bitlib.conv, from chapters/03_weight_standardization.py: Weight Standardization; standardised convolutions, and folding them away for inference.
- bitlib.resnet, from chapters/04_resnet_v2.py: ResNet-v2 with pre-activation bottlenecks, from R50x1 to R152x4, and its mini variants.
- bitlib.checkpoints, from chapters/05_checkpoints.py: Checkpoints: official .npz, timm and transformers weights, safetensors; load_pretrained.
- bitlib.pretrain, from chapters/06_pretraining.py: Upstream pre-training: SGD with momentum, schedules, losses, and a training loop that survives.
- bitlib.hyperrule, from chapters/07_hyperrule.py: The BiT-HyperRule, data set size and image size in, every hyper-parameter out; and MixUp.
- bitlib.finetune, from chapters/08_finetuning.py: Fine-tuning: a head of zeros, few-shot sampling, a leakage check, the downstream loop.
- bitlib.evaluate, from chapters/09_evaluation.py: Accuracy, calibration, intervals, paired tests, protocols and few-shot evaluation.

Written by tools/export.py from the chapters: edit those, not this package.
"""

__version__ = "0.1.0"
