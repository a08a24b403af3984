"""ViT-g/14, a billion parameters, on ImageNet-21k: the published size, with the recipe published for smaller ones.

The report trained it on images that are not public. The recipe here is big_vision's for ImageNet-21k with its strongest
augmentation (L/16's), without mixup, whose labels of 21,843 numbers would be more than the images, and without the
head's first bias of -10.

Prepare   bigjax data prepare images --help makes a dataset of a folder of images for each class
Command   bigjax train --config=configs/imagenet21k_vit_g14.py:images=FOLDER --workdir=runs/imagenet21k_vit_g14
Data      ImageNet-21k, 21,843 classes, as prepared
Hardware  TPU v5e, 8x16 (128 chips); `make plan CONFIGS=configs/imagenet21k_vit_g14.py` holds it to that
Expected  not run, and no figure is published for this size on this data
Source    https://arxiv.org/abs/2106.04560, table 2 (size); github.com/google-research/big_vision,
          big_vision/configs/vit_i21k.py (recipe), of https://arxiv.org/abs/2106.10270
"""

import ml_collections

from bigjax.config import parse_arg

CLASSES = 21843


def get_config(arg=None):
  arg = parse_arg(arg, images="data/imagenet21k")
  images = dict(name="tfds", dataset=arg.images, features=("image", "label"))
  config = ml_collections.ConfigDict()
  config.total_steps = "300 epochs"
  config.batch_size = 4096
  config.data = dict(
    source=dict(**images, split="train[51200:]"),
    preprocess="inception_crop(224)|flip_lr|randaugment(2,15)|value_range(-1,1)",
  )
  config.model = dict(
    name="vit", variant="g/14", image_size=224, num_classes=CLASSES, head="gap", scan=True, remat="save(qkv,attention)"
  )
  config.task = dict(name="classification", loss="sigmoid")
  config.optimizer = dict(name="adamw", weight_decay=0.0, mu_dtype="bfloat16")
  config.schedule = dict(name="cosine", peak=1e-3, warmup=10_000)
  config.decay = [(".*kernel", 0.1)]  # Times the rate: 1e-4 at the peak.
  config.clip = dict(norm=1.0)
  config.precision = "mixed"
  config.mesh = [("data", -1)]
  config.sharding = "fsdp"
  config.evals = dict(
    val=dict(
      evaluator=dict(name="classification", num_classes=CLASSES),
      data=dict(
        source=dict(**images, split="train[25600:51200]"),
        preprocess="decode|resize_small(256)|central_crop(224)|value_range(-1,1)",
      ),
      every=1000,
      batch_size=2048,
    )
  )
  config.checkpoint_every = 1000
  config.plan = dict(topology="v5e:8x16", hbm_gib=8.0, collective_gib=6.0, mfu_bound=0.8)
  return config
