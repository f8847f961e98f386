"""Every setting of a run, typed, with its unit and default.

One dataclass per component: a function receives the section it needs, never the whole config. `config_loading` fills them from
YAML files and the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ModelConfig:
    """The network: a registered timm model name and the keywords it is created with.

    Args:
        name: a name known to timm after `import taylorvit`.
        attention: a name in `taylorvit.attention.ATTENTIONS`.
        attention_options: options of that attention, such as `{form: direct, temperature_init: 1.0}`.
        num_classes: size of the classifier's output.
        vocab_size: tokens that exist; `taylorvit_sequence` needs it, images have none.
        max_length: tokens of the longest sequence; likewise.
        in_chans: channels of an input image, 1 (grey) or 3 (RGB).
        img_size: side of the square input, in pixels.
        patch_size: side of a patch, in pixels; null keeps the registered model's.
        embed_dim: width C; null keeps the registered model's.
        depth: number of blocks; null keeps the registered model's.
        num_heads: number of heads H, a divisor of the width; null keeps the registered model's.
        mlp_ratio: hidden width of the MLP over C; null keeps the registered model's.
        drop_path_rate: stochastic depth at the last block, rising linearly from 0.
        drop_rate: dropout before the classifier.
        kwargs: any other keyword of timm's VisionTransformer.
    """

    name: str = "taylorvit_tiny_patch16_224"
    attention: str = "taylorshift"
    attention_options: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 1000
    vocab_size: int | None = None
    max_length: int | None = None
    in_chans: int = 3
    img_size: int = 224
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Where the images come from and how they are read.

    Args:
        dataset: `folder` (class sub-folders), `tar` (one tar a split, class sub-folders), `wds` (webdataset shards),
            `fashion_mnist` (idx.gz files), `digits` (scikit-learn's, written as an image folder on first use),
            `torch/NAME` (torchvision) or `hfds/NAME` (Hugging Face datasets), both through timm's readers;
            `pixels/NAME` reads any of these as sequences of grey pixels; `listops` (tools/make_listops.py's files or Long
            Range Arena's) and `imdb` (film reviews byte by byte, cut off at model.max_length).
        root: folder that holds the data set; of `imdb` also the .tar or .tar.gz.
        train_split: sub-folder or split to train on; `NAME[:90%]` is the first 90 of every 100 of its images.
        val_split: sub-folder or split to evaluate on, such as `NAME[90%:]`, the other ten.
        test_split: split that studies report at the end; training never opens it. null: there is none.
        num_workers: loader processes per training process; 0 loads in the training process.
        prefetch_factor: batches each worker prepares ahead.
        pin_memory: copy batches through page-locked memory (GPU only).
        mean: per-channel mean after scaling to 0..1.
        std: per-channel standard deviation after scaling to 0..1.
        interpolation: how images are resized.
        crop_pct: evaluation resizes the shorter side to img_size / crop_pct, then crops the centre.
        on_error: an image that is damaged ends the run (`stop`) or is left out (`skip`): training takes the next readable one
            of the set in its place, evaluation judges the others and says how many; all are listed in run_dir.
        max_bad_share: of a set's images that `skip` may leave out, rounded up to whole images; more end the run.
        io_retries: how often an image is read again, after 0.5, 1, 2, ... seconds, where the system cannot read its bytes;
            then the run ends, with either value of on_error, for the image may be there again when it is resumed.
    """

    dataset: str = "folder"
    root: str = "data/imagenet"
    train_split: str = "train"
    val_split: str = "val"
    test_split: str | None = None
    num_workers: int = 8
    prefetch_factor: int = 2
    pin_memory: bool = True
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    crop_pct: float = 1.0
    on_error: Literal["stop", "skip"] = "stop"
    max_bad_share: float = 0.0001
    io_retries: int = 3


@dataclass
class AugmentConfig:
    """Training-time augmentation and label mixing; evaluation uses none of it.

    Args:
        crop: `simple` = resize the shorter side, pad, random crop; `random_resized` = random area and aspect;
            `none` = the evaluation geometry; `random_window` = of a film review (imdb) longer than model.max_length so many
            bytes from anywhere, where `none` takes the first.
        crop_padding: reflected border of the simple crop, in pixels.
        crop_scale: smallest and largest area share of the random resized crop.
        crop_ratio: smallest and largest aspect ratio of the random resized crop.
        hflip: probability of a horizontal flip.
        three_augment: apply exactly one of grey, solarize and blur (3-Augment of DeiT III, arXiv:2204.07118).
        color_jitter: strength of brightness, contrast and saturation jitter; 0 is off.
        auto_augment: a timm policy such as `rand-m9-mstd0.5-inc1`; null is off.
        random_erasing: probability that a rectangle is replaced by noise.
        mixup_alpha: Beta parameter of MixUp; 0 is off.
        cutmix_alpha: Beta parameter of CutMix; 0 is off.
        mix_prob: probability that a pair of images is mixed at all.
        mix_switch_prob: probability of CutMix where both are on.
        label_smoothing: share of the target spread evenly over all classes.
    """

    crop: Literal["simple", "random_resized", "none", "random_window"] = "simple"
    crop_padding: int = 4
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    hflip: float = 0.5
    three_augment: bool = True
    color_jitter: float = 0.3
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 1.0
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    label_smoothing: float = 0.1


@dataclass
class OptimConfig:
    """The optimizer, by its timm name, and the gradient's treatment.

    Args:
        name: a timm optimizer name (`lamb`, `adamw`, ...); what is named is built or refused, never swapped.
        lr: learning rate at `lr_base_batch_size` images per update.
        lr_scaling: `none` uses lr as it stands; `linear` and `sqrt` scale it by global_batch_size / lr_base_batch_size.
        lr_base_batch_size: images per update that lr belongs to.
        weight_decay: decoupled weight decay; never on biases, norms, embeddings and tokens.
        decay_temperature: also decay the attention temperature, as the authors' code did.
        temperature_lr_scale: factor on the learning rate of the attention temperature.
        eps: the optimizer's epsilon; null keeps the optimizer's default.
        betas: moment decay rates; null keeps the optimizer's default.
        momentum: of optimizers that have one; null is timm's 0.9.
        layer_decay: factor on the learning rate per layer counted from the head; null is off.
        max_grad_norm: global gradient-norm clip, applied once, before the optimizer; null is off.
        kwargs: any other keyword of the optimizer.
    """

    name: str = "lamb"
    lr: float = 3e-3
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    lr_base_batch_size: int = 2048
    weight_decay: float = 0.02
    decay_temperature: bool = False
    temperature_lr_scale: float = 1.0
    eps: float | None = None
    betas: tuple[float, float] | None = None
    momentum: float | None = None
    layer_decay: float | None = None
    max_grad_norm: float | None = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the update number.

    Args:
        name: a timm schedule: `cosine`, `tanh`, `poly` (a straight line), `constant` (after the warm-up), or `rsqrt`: after w
            updates of warm-up, lr * sqrt(w / t) in update t, but not below min_lr.
        epochs: length of the schedule.
        updates_per_epoch: updates that make an epoch; the samples left over sit it out, others each time. null: as many as
            there are whole batches.
        warmup_epochs: linear rise from warmup_lr, part of `epochs`.
        warmup_lr: learning rate of the first update.
        min_lr: learning rate at the end; of `rsqrt` the lowest.
        stop_epoch: leave after this many epochs without changing the schedule; null runs all.
    """

    name: Literal["cosine", "tanh", "poly", "constant", "rsqrt"] = "cosine"
    epochs: int = 300
    updates_per_epoch: int | None = None
    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    stop_epoch: int | None = None


@dataclass
class TrainConfig:
    """One update, whatever the number of processes.

    Args:
        global_batch_size: images per optimizer update, summed over processes and accumulation.
        micro_batch_size: images per forward pass and process; null takes all of a process's share at once.
        mixed_precision: `no` (fp32), `bf16`, or `fp16` with a gradient scaler (GPU only).
        loss: `cross_entropy` on soft targets, or `bce` (binary cross-entropy per class).
        compile: compile the model with torch.compile.
        grad_checkpointing: recompute activations in the backward pass.
        channels_last: NHWC memory format for the images.
        ema_decay: decay of the averaged weights, evaluated beside the raw ones; null is off.
        ema_warmup: let the decay rise from 0 towards ema_decay, so that short runs have a usable average.
        finetune: weights to start from: a run folder, a step folder, an export folder, a safetensors or .pth file,
            or `timm:NAME` for a pretrained timm model; head and position embedding are adapted.
        freeze: `backbone` trains the classifier alone (linear probe).
    """

    global_batch_size: int = 2048
    micro_batch_size: int | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    compile: bool = False
    grad_checkpointing: bool = False
    channels_last: bool = False
    ema_decay: float | None = None
    ema_warmup: bool = True
    finetune: str | None = None
    freeze: Literal["none", "backbone"] = "none"


@dataclass
class EvaluateConfig:
    """Evaluation during training.

    Args:
        batch_size: images per forward pass and process.
        every_epochs: evaluate after every so many epochs, and always after the last.
    """

    batch_size: int = 256
    every_epochs: int = 1


@dataclass
class CheckpointConfig:
    """When a checkpoint is written and which ones are kept.

    Args:
        every_epochs: save after every so many epochs, and always after the last.
        every_updates: save also after every so many updates; null is off.
        keep_last: newest checkpoints kept, at least 2.
        keep_best: best checkpoints kept, ranked by `metric`.
        milestone_every_epochs: keep every so many epochs for ever; null is off.
        metric: top-1 that ranks checkpoints and chooses the export: of the raw or of the averaged weights.
    """

    every_epochs: int = 1
    every_updates: int | None = None
    keep_last: int = 2
    keep_best: int = 1
    milestone_every_epochs: int | None = None
    metric: Literal["top1", "ema_top1"] = "top1"


@dataclass
class LogConfig:
    """What is shown and recorded.

    Args:
        every_updates: updates between two lines of metrics.
        tensorboard: write TensorBoard events below run_dir/tensorboard.
        image_grid: number of augmented training images shown at the start of the run; 0 is off, sequences have none.
        histogram_every_epochs: temperature histograms after every so many epochs; 0 is off.
        peak_tflops: the device's peak for the model FLOP/s utilisation, in TFLOP/s; null looks known GPUs up.
    """

    every_updates: int = 50
    tensorboard: bool = True
    image_grid: int = 16
    histogram_every_epochs: int = 1
    peak_tflops: float | None = None


@dataclass
class Config:
    """A whole run.

    Args:
        run_dir: folder of the run: config, checkpoints, metrics, export.
        seed: of everything random; samples, mixing and drop path are keyed by it and their position.
        resume: `auto` continues the newest checkpoint in run_dir or starts anew; `never` refuses a folder that holds a
            run; or the path of a step folder.
        allow_change: keys, such as `optim.lr`, that may differ from the checkpoint's; the run is then no longer the same.
        device: `auto` (GPU where there is one), `cpu` or `cuda`.
        timeout_seconds: a collective operation that waits longer ends the run; a batch of images may take 4/5 of it.
        model: the network.
        data: the images.
        augment: training-time augmentation.
        optim: the optimizer.
        schedule: the learning rate.
        train: one update.
        evaluate: evaluation during training.
        checkpoint: saving.
        log: logging.
    """

    run_dir: str = "runs/default"
    seed: int = 0
    resume: str = "never"
    allow_change: list[str] = field(default_factory=list)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: int = 1800
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
