"""Big Transfer (BiT) from scratch: the package that the book derives, one module a chapter, in their order.

- data: Pictures in and out of the network, the upstream GlyphNet, and the downstream tasks.
- norm: Group Normalization, derived from its equation.
- conv: Weight Standardization; standardised convolutions, and folding them away for inference.
- resnet: ResNet-v2 with pre-activation bottlenecks, from R50x1 to R152x4, and its mini variants.
- checkpoints: Checkpoints: official .npz, timm and transformers weights, safetensors; load_pretrained.
- pretrain: Upstream pre-training: SGD with momentum, schedules, losses, and a training loop that survives.
- hyperrule: The BiT-HyperRule, data set size and image size in, every hyper-parameter out; and MixUp.
- finetune: Fine-tuning: a head of zeros, few-shot sampling, a leakage check, the downstream loop.
- evaluate: Accuracy, calibration, intervals, paired tests, protocols and few-shot evaluation.
- cli: Your own images: a folder of pictures in, a classifier and a report out, from the command line.

Written by tools/export.py from the chapters: edit those, not this package.
"""

__version__ = "0.1.0"
