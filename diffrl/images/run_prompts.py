"""The prompts of a run: of a file, of the images or pairs that it learns from, or a built-in model's own."""

from diffrl.images.config import DPOConfig, FinetuneConfig, ReFLConfig, SupervisedConfig
from diffrl.images.examples import folder_examples, folder_pairs
from diffrl.images.lists import METADATA, line_of, read_prompts
from diffrl.images.model import ImageModel
from diffrl.images.models.pipelines import PipelineModel, PixelModel
from diffrl.images.samples import Prompts, conditions, plain, prompts_of
from diffrl.support.errors import UserError

OF = ("data", "pairs")
"""The options that name folders whose prompts may be a run's."""


def prompts_of_run(config: FinetuneConfig, model: ImageModel, base: str | None) -> Prompts:
    """The prompts of --prompts; else those of the images or pairs; else a built-in model's classes, or the empty prompt
    of a model that takes none.

    base: the built-in model that it is or began as. All are encoded once, so that a bad one is found before training.
    """
    # Of pairs beside --prompts, too, what is wrong with them is found before the run has a folder.
    pairs = folder_pairs(config.pairs, model) if isinstance(config, DPOConfig) and config.pairs is not None else None
    if config.prompts is not None:
        texts, metadata = read_prompts(config.prompts, files=model.extras)
        prompts = Prompts(tuple(texts), tuple(metadata))
    elif isinstance(config, SupervisedConfig | ReFLConfig) and config.data not in (None, "digits"):
        examples = folder_examples(config.data, model)
        prompts = Prompts(tuple(examples.prompts), tuple(examples.metadata))
    elif pairs is not None:
        each = {(text, *of.values()): (text, of) for text, of in zip(pairs.prompts, pairs.metadata, strict=True)}
        prompts = Prompts(tuple(text for text, _ in each.values()), tuple(of for _, of in each.values()))
    elif base is not None:
        prompts = plain(prompts_of(base))
    elif isinstance(config, SupervisedConfig) or (isinstance(model, PixelModel) and model.classes is None):
        prompts = plain([""])
    else:
        raise UserError(f"Which prompts? {config.model} needs --prompts FILE, one a line.")
    for name in model.extras:
        if not all(entry.get(name) for entry in prompts.metadata):
            source = next(
                (f", or --{option} whose {METADATA} names them" for option in OF if hasattr(config, option)), ""
            )
            raise UserError(
                f"{config.model} needs a {name!r} image beside each prompt: give --prompts FILE.jsonl with lines such "
                f'as {{"prompt": "a cat", "{name}": "1.png"}}{source}.'
            )
    if not model.extras:
        _check_each(config, model, prompts)
    first = conditions(model, prompts.texts[:1], prompts.metadata[:1])
    if config.guidance != 1:
        model.network(first, guidance=config.guidance)  # a model that takes none says so
    if config.lean and isinstance(model, PipelineModel):
        model.settle([*prompts.texts, *_prompts_of_data(config, model)])
    return prompts


def _check_each(config: FinetuneConfig, model: ImageModel, prompts: Prompts) -> None:
    """Encode each prompt once. Raises UserError for one that the model does not know, with its file and line."""
    for prompt in dict.fromkeys(prompts.texts):
        try:
            conditions(model, [prompt], [{}])
        except UserError as error:
            if config.prompts is None:
                raise
            line = line_of(config.prompts, prompts.texts.index(prompt))
            default = ", the default" * (config.model == type(config).model)
            other = f" Of another model than {config.model}{default}? Give --model." * config.builtin
            raise UserError(f"{config.prompts}, line {line}, {prompt!r}: {error}{other}") from error


def _prompts_of_data(config: FinetuneConfig, model: ImageModel) -> list[str]:
    """The prompts that stand beside a run's images or pairs."""
    if isinstance(config, SupervisedConfig | ReFLConfig) and config.data not in (None, "digits"):
        return list(folder_examples(config.data, model).prompts)
    if isinstance(config, DPOConfig) and config.pairs is not None:
        return list(folder_pairs(config.pairs, model).prompts)
    return []
