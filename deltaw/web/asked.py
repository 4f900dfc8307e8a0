"""What may be asked: OpenAI's fields, and vLLM's further ones. One that is not known is an error, and not passed over.

References: the OpenAI API reference (completions, chat completions); vLLM's sampling parameters.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from deltaw.decode.sampling import Penalty, Sampling
from deltaw.errors import UserError
from deltaw.models.tokenizer import Message
from deltaw.serve.grammar import Kind
from deltaw.settings import Share, names

Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Number = Annotated[int, Field(ge=0, le=10**9)]
Place = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Few = Annotated[int, Field(ge=0, le=20)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
"""What clients send though there is none of it."""
Prompt = str | list[str] | list[Token] | list[list[Token]]


class Body(BaseModel):
    """What every body has in common."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    """What comes at a stream's end."""

    include_usage: bool = False


class JsonSchema(Body):
    """A schema as OpenAI's clients send it."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema", default_factory=dict)


class ResponseFormat(Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type 'json_schema'")
        return self


class Structured(Body):
    """What an answer must be, in vLLM's words: one of these."""

    json_: str | dict[str, Any] | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None


class Asked(Body):
    """The fields that completions and chats share."""

    model: str
    max_tokens: Number | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=10**9)] | None = None
    min_p: Share | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stop_token_ids: list[Token] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=100)] | None = None
    ignore_eos: bool = False
    min_tokens: Number = 0
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Lower ones come first, among those of one key."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Structured | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    """Of no effect, as the one before; OpenAI's clients may send them. What follows may ask for nothing only."""
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    store: Literal[False] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, room: int) -> Sampling:
        """How the answer is drawn, of at most `room` tokens if nothing is said."""
        given = {"temperature": 1.0, **self.model_dump(include={*names(Sampling)}, exclude_none=True)}
        most = max(1, room if self.most is None else self.most)
        own = {"top_k": max(0, self.top_k or 0), "max_new_tokens": most, "seed": (self.seed or 0) % 2**32}
        return Sampling(**given | own)

    @property
    def most(self) -> int | None:
        """Tokens that the answer may have, if that is said."""
        return self.max_tokens

    @property
    def tops(self) -> int | None:
        """How many of the likeliest tokens are told for each; None: nothing is."""
        return None

    def grammar(self) -> tuple[Kind, Any] | None:
        """What the answer must be, if anything is said.

        Raises:
            UserError: more than one thing is.
        """
        told: list[tuple[Kind, Any]] = []
        if (form := self.response_format) is not None and form.type != "text":
            told.append(("json", form.json_schema.schema_ if form.json_schema else {"type": "object"}))
        if (own := self.structured_outputs) is not None:
            told += [(cast("Kind", name.rstrip("_")), value) for name, value in own if value is not None]
        if len(told) > 1:
            raise UserError("An answer can be held to one form only.")
        return told[0] if told else None


class CompletionAsked(Asked):
    """`POST /v1/completions`."""

    prompt: Prompt
    max_tokens: Number | None = 16
    echo: bool = False
    logprobs: Few | None = None
    add_special_tokens: bool = True
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def tops(self) -> int | None:
        return self.logprobs


def _plain(told: str | list[dict[str, Any]] | None) -> str:
    """Parts as one text."""
    if told is None or isinstance(told, str):
        return told or ""
    if odd := [p for p in told if p.get("type") != "text" or not isinstance(p.get("text"), str)]:
        raise ValueError(f"a part of the type {odd[0].get('type')!r} is none that a model of text reads")
    return "".join(str(part["text"]) for part in told)


class Turn(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[dict[str, Any]] | None, AfterValidator(_plain)]
    name: str | None = None
    refusal: None = None
    tool_calls: Nothing = None
    annotations: Nothing = None
    function_call: None = None
    audio: None = None


def turns(messages: Sequence[Turn]) -> list[Message]:
    """Messages as templates have them, to which whoever developed is the system."""
    return [{"role": turn.role.replace("developer", "system"), "content": str(turn.content)} for turn in messages]


def _asked_for(told: int | None, info: ValidationInfo) -> int | None:
    if told and not info.data.get("logprobs"):
        raise ValueError("it goes with logprobs: true")
    return told


class ChatAsked(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Few | None, AfterValidator(_asked_for)] = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def most(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tops(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeAsked(Body):
    """`POST /tokenize`: a text, or a conversation."""

    model: str = ""
    prompt: str | None = None
    messages: list[Turn] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeAsked(Body):
    """`POST /detokenize`."""

    model: str = ""
    tokens: list[Token]


class AdapterAsked(Body):
    """`POST /v1/adapters`: a path in one of the folders that are served."""

    name: str
    path: Place


class LoadAsked(Body):
    """`POST /v1/load_lora_adapter`, vLLM's."""

    lora_name: str
    lora_path: Place
    load_inplace: bool = False


class UnloadAsked(Body):
    """`POST /v1/unload_lora_adapter`, vLLM's."""

    lora_name: str
    lora_int_id: int | None = None
