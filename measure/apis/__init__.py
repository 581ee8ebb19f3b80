"""HTTP APIs of servers: what is sent, and what comes back. Bytes and values only: no sockets, no clock."""

from measure.apis.api import Api
from measure.apis.openai import Chat, Completions
from measure.apis.tgi import Tgi

APIS: dict[str, type[Api]] = {"tgi": Tgi, "completions": Completions, "chat": Chat}
