"""Who may call, and what: keys are known by salted hash only."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graft.core.errors import ConfigError
from graft.serving.errors import ApiError

if TYPE_CHECKING:
    from graft.recipe.operation import TenantSection

logger = logging.getLogger(__name__)

SHORT_KEY = 16


@dataclass(frozen=True)
class Tenant:
    """One tenant as the gateway knows it; the key itself stays in the environment."""

    name: str
    models: frozenset[str]
    """Served names that it may call; `base` is the bare base."""
    salt: bytes = field(repr=False)
    key_hash: bytes = field(repr=False)


def read_tenants(
    sections: Iterable[TenantSection], environ: Mapping[str, str]
) -> tuple[Tenant, ...]:
    """Reads every tenant's key from its environment variable and keeps a salted hash.

    Raises:
        ConfigError: No tenant at all, a variable that is not set or holds no usable key, or two
            tenants with one key.
    """
    tenants: list[Tenant] = []
    owners: dict[str, str] = {}
    for section in sections:
        key = environ.get(section.key_env, "")
        where = f"serve.tenants: the key of {section.name!r}"
        if not key.strip():
            raise ConfigError(
                f"{where} is expected in the environment variable {section.key_env}, which is not "
                "set; set it before serving"
            )
        if key != key.strip() or not key.isascii() or not key.isprintable():
            raise ConfigError(
                f"{where} in {section.key_env} has spaces around it or characters that no HTTP "
                "header carries; use printable ASCII"
            )
        if key in owners:
            raise ConfigError(
                f"{where} in {section.key_env} is also that of {owners[key]!r}; give each its own"
            )
        if len(key) < SHORT_KEY:
            logger.warning("%s is shorter than %d characters", where, SHORT_KEY)
        owners[key] = section.name
        salt = secrets.token_bytes(16)
        models = frozenset(section.models)
        tenants.append(Tenant(section.name, models, salt, _hash(salt, key.encode())))
    if not tenants:
        raise ConfigError(
            "serve.tenants is empty, so nobody could call; add at least one: "
            "{name: me, key_env: GRAFT_KEY_ME, models: [NAME]} and set that variable to a secret"
        )
    return tuple(tenants)


def authenticate(tenants: tuple[Tenant, ...], headers: Iterable[tuple[bytes, bytes]]) -> Tenant:
    """Returns the tenant whose key the request carries.

    Args:
        tenants: All of them; each is compared, whatever the first comparisons say.
        headers: Of the ASGI scope.

    Raises:
        ApiError: 401: no key, a wrong key, another scheme, or two Authorization headers.
    """
    given = [value for name, value in headers if name.lower() == b"authorization"]
    if not given:
        raise _unauthorized(
            "You didn't provide an API key. Send it as a header: Authorization: Bearer KEY."
        )
    scheme, _, key = given[0].partition(b" ")
    key = key.strip()
    found = None
    for tenant in tenants:
        if hmac.compare_digest(tenant.key_hash, _hash(tenant.salt, key)):
            found = tenant
    if len(given) > 1 or scheme.lower() != b"bearer" or not key or found is None:
        raise _unauthorized("Incorrect API key provided.")
    return found


def _hash(salt: bytes, key: bytes) -> bytes:
    return hmac.digest(salt, key, hashlib.sha256)


def _unauthorized(message: str) -> ApiError:
    headers = {"WWW-Authenticate": 'Bearer realm="graft"'}
    return ApiError(401, "invalid_api_key", message, headers=headers)
