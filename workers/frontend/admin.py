"""The operators' routes: operations on the live workers behind the frontend, under a key of their own.

    GET  /admin/members               what every worker says of itself
    GET, POST /admin/limits           the limits of load (`workers.frontend.admission`), or other values for some, at all frontends;
                                      of all models, or of the one named by "model"
    POST /admin/<operation>           {"members": [...]} or {"role": ...}, or neither for all, or {"model": ...} for all workers
                                      of one model; and the operation's arguments
    POST /sleep?level=1, /wake_up, /pause, /resume, /reset_prefix_cache, /start_profile, /stop_profile,
         /v1/load_lora_adapter, /v1/unload_lora_adapter          the same, under vLLM's names

The answer lists what each member said. Its status is 200 when all did it, and otherwise the worst of theirs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import parse_qsl

import msgspec

from launch.errors import closest
from launch.plan import Member, Plan
from launch.recipe import Kind
from workers.frontend.errors import ApiError, error_body
from workers.frontend.http import Request
from workers.frontend.keys import authorize
from workers.frontend.models import Models
from workers.frontend.reply import Reply as Answer
from workers.runtime import commands
from workers.runtime.commands import Command, Operation, OperationError, Reply
from workers.runtime.keys import KeyRing, Scope

log = logging.getLogger(__name__)

PREFIX = "/admin/"
MEMBERS = "/admin/members"
LIMITS = "/admin/limits"
VLLM_NAMES: Mapping[str, Operation] = {
    "/v1/load_lora_adapter": Operation.LOAD_LORA,
    "/v1/unload_lora_adapter": Operation.UNLOAD_LORA,
    "/reset_prefix_cache": Operation.CLEAR,
    "/sleep": Operation.SLEEP,
    "/wake_up": Operation.WAKE,
    "/pause": Operation.PAUSE,
    "/resume": Operation.RESUME,
    "/start_profile": Operation.START_PROFILE,
    "/stop_profile": Operation.STOP_PROFILE,
}
VLLM_FIELDS = {"lora_name": "name", "lora_path": "path", "profile_prefix": "prefix"}
ADAPTERS = (Operation.LOAD_LORA, Operation.UNLOAD_LORA, Operation.LIST_LORA)
GENERATING = (Kind.PREFILL, Kind.DECODE, Kind.AGGREGATED)


class Asks(Protocol):
    """What sends commands (`workers.runtime.commands.Commander`)."""

    async def ask(self, member: str, command: Command, timeout_s: float) -> Reply:
        """One member's reply."""
        ...


class Admin:
    """The handler of the operators' routes. `registered(member)` says whether a worker is there to be asked."""

    def __init__(
        self,
        plan: Callable[[], Plan],
        models: Models,
        named: Mapping[str, str],
        asks: Asks,
        registered: Callable[[str], bool],
        keys: KeyRing,
        drain_s: float,
    ) -> None:
        """Make it; `named` has the key of each model in the recipe (`Member.model`), by the name that clients use."""
        self._models = models
        self._named = named
        self._plan = plan
        self._asks = asks
        self._registered = registered
        self._keys = keys
        self._drain_s = drain_s
        self.change_limits: Callable[[Sequence[str], dict[str, Any]], Awaitable[None]] | None = None

    @property
    def _members(self) -> dict[str, Member]:
        """Those who can be asked, by name: members join and leave."""
        return {member.name: member for member in self._plan().members if member.leader}

    def owns(self, path: str) -> bool:
        """Whether a path is one of these routes."""
        return path.startswith(PREFIX) or path in VLLM_NAMES

    async def __call__(self, request: Request, connection: Answer) -> None:
        """Answer one request.

        Raises:
            ApiError: It is not allowed, or not understood; nothing was done.
        """
        authorize(self._keys, request, Scope.ADMIN)
        if request.path == LIMITS:
            await self._limits(request, connection)
            return
        listing = request.path == MEMBERS
        if request.method != ("GET" if listing else "POST"):
            raise ApiError(405, f"{request.path} takes {'GET' if listing else 'POST'}, not {request.method}")
        try:
            if listing:
                replies = await self._ask(Operation.STATUS, {}, list(self._members.values()))
                report: dict[str, Any] = {"operation": Operation.STATUS, "members": replies}
                connection.respond(200, msgspec.json.encode(report))
                return
            operation, given = self._understand(request)
            targets = self._targets(operation, given)
            self._check_adapter(operation, given, targets)
            partial = _partial(given)
            commands.arguments(operation, given)  # what is wrong for all is said once
        except OperationError as error:
            raise ApiError(error.status, str(error)) from error
        replies = await self._ask(operation, given, targets)
        report = {"operation": operation, "members": replies}
        if operation is Operation.LOAD_LORA and not partial:
            report["rolled_back"] = await self._roll_back(given, replies)
        self._respond(connection, report, replies)

    async def _limits(self, request: Request, connection: Answer) -> None:
        if request.method not in ("GET", "POST"):
            raise ApiError(405, f"{LIMITS} takes GET or POST, not {request.method}")
        given = _given(request)
        named = given.pop("model", None)
        services = self._models.services if named is None else (self._models.find(str(named)),)
        if request.method == "POST" and given and self.change_limits is not None:
            await self.change_limits([service.served.name for service in services], given)
        answer: dict[str, Any] = {}
        for service in services:
            gate = service.gate
            answer[service.served.name] = {
                "limits": gate.whole,
                "waiting": gate.waiting,
                "frontends": gate.frontends,
                "of_this_one": gate.thresholds,
            }
        only = next(iter(answer.values())) if len(answer) == 1 else {}
        connection.respond(200, msgspec.json.encode(only | {"models": answer}))

    def _understand(self, request: Request) -> tuple[Operation, dict[str, Any]]:
        """The operation and its arguments, from the query and the body; of a field in both the body's value counts."""
        given = _given(request)
        operation = VLLM_NAMES.get(request.path)
        if operation is None:
            return commands.operation(request.path.removeprefix(PREFIX)), given
        return operation, {VLLM_FIELDS.get(name, name): value for name, value in given.items()}

    def _targets(self, operation: Operation, given: dict[str, Any]) -> list[Member]:
        """Takes `members`, `role` and `model` out of what was given, and returns the members that are meant."""
        names, role, model = given.pop("members", None), given.pop("role", None), given.pop("model", None)
        if names is not None and (role is not None or model is not None):
            raise ApiError(400, "give either members or role (and model), not both")
        if names is not None:
            names = [names] if isinstance(names, str) else names
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise ApiError(400, "members is a list of names", param="members")
            return [self._member(name) for name in dict.fromkeys(names)]
        found = list(self._members.values())
        if model is not None:
            if not isinstance(model, str) or model not in self._named:
                there = ", ".join(map(repr, self._named))
                raise ApiError(404, f"there is no model {model!r} in this deployment: it serves {there}", param="model")
            found = [member for member in found if member.model == self._named[model]]
        if role is not None:
            found = [member for member in found if role in (member.kind, member.group)]
            if not found:
                roles = ", ".join(sorted({member.group for member in self._members.values()}))
                raise ApiError(404, f"there is no {role!r} worker in this deployment: it has {roles}", param="role")
        elif operation in ADAPTERS:
            found = [member for member in found if member.kind in GENERATING]
        if not found:
            raise ApiError(404, f"this deployment has no worker for {operation}")
        return found

    def _check_adapter(self, operation: Operation, given: Mapping[str, Any], targets: Sequence[Member]) -> None:
        """An adapter belongs to one model, and its name to one of both."""
        if operation not in (Operation.LOAD_LORA, Operation.UNLOAD_LORA):
            return
        keys = {member.model for member in targets}
        bases = [name for name, key in self._named.items() if key in keys]
        if len(bases) > 1:
            raise ApiError(
                400,
                f"an adapter belongs to one model, and {' and '.join(map(repr, bases))} are meant: name it as model",
                param="model",
            )
        owner = self._models.owner(str(given.get("name")))
        if operation is Operation.LOAD_LORA and owner is not None and [owner] != bases:
            raise ApiError(409, f"the name {given['name']!r} is taken: requests with it go to the model {owner!r}")

    def _member(self, name: str) -> Member:
        found = self._members.get(name)
        if found is None:
            raise ApiError(
                404,
                f"there is no worker {name!r}{closest(name, self._members)}; there are {', '.join(self._members)}",
                param="members",
            )
        return found

    async def _ask(self, operation: Operation, given: Mapping[str, Any], targets: Sequence[Member]) -> list[Reply]:
        """All at once; the replies in the order of the targets."""
        timeout_s = commands.patience_s(operation, commands.arguments(operation, given), self._drain_s)
        command = Command(operation=operation, arguments=dict(given))

        async def one(member: str) -> Reply:
            if not self._registered(member):
                return Reply(member=member, status=503, message="it is not registered: it is starting, or lost")
            return await self._asks.ask(member, command, timeout_s)

        return await asyncio.gather(*(one(member.name) for member in targets))

    async def _roll_back(self, given: Mapping[str, Any], replies: Sequence[Reply]) -> list[Reply]:
        """An adapter that not all could load is served by none: unload it where this request has loaded it."""
        if all(reply.status == 200 for reply in replies):
            return []
        # A member that did not answer in time may have loaded it all the same.
        loaded = [self._members[reply.member] for reply in replies if reply.result.get("loaded") or reply.status == 504]
        if not loaded:
            return []
        log.warning("adapter %s was not loaded everywhere; unloading it where it was", given.get("name"))
        return await self._ask(Operation.UNLOAD_LORA, {"name": given["name"]}, loaded)

    def _respond(self, connection: Answer, report: dict[str, Any], replies: Sequence[Reply]) -> None:
        failed = [reply for reply in replies if reply.status != 200]
        if not failed:
            connection.respond(200, msgspec.json.encode(report))
            return
        status = max(reply.status for reply in failed)
        said = "; ".join(f"{reply.member}: {reply.message}" for reply in failed)
        error = msgspec.json.decode(error_body(status, said))
        connection.respond(status, msgspec.json.encode(error | report))


def _given(request: Request) -> dict[str, Any]:
    """What a request says in its query and its body."""
    body: Any = {}
    if request.body.strip():
        try:
            body = msgspec.json.decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return dict(parse_qsl(request.query, keep_blank_values=True)) | body


def _partial(given: dict[str, Any]) -> bool:
    """Takes `partial` out of what was given: whether members that succeeded keep what others could not do."""
    value = given.pop("partial", False)
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        raise ApiError(400, f"partial is true or false, got {value!r}", param="partial")
    return value
