"""The fields that our manifests use of kinds whose definitions are not at hand, as strict models.

Prometheus operator: monitoring.coreos.com/v1. Gateway API: gateway.networking.k8s.io/v1, its standard channel. Where
the folder of definitions has the real ones too, those decide (tests/k8s/schemas.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Duration = Annotated[str, Field(pattern=r"^(0|([0-9]+(\.[0-9]+)?(ms|s|m|h)){1,4})$")]
Hostname = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class Strict(BaseModel):
    """A part of an object: no field but these, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Requirement(Strict):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []


class Selector(Strict):
    matchLabels: dict[str, str] = {}
    matchExpressions: list[Requirement] = []


class SecretKey(Strict):
    name: str
    key: str
    optional: bool = False


class Authorization(Strict):
    credentials: SecretKey
    type: str = "Bearer"


class Scrape(Strict):
    port: str
    path: str = "/metrics"
    interval: Duration
    scrapeTimeout: Duration | None = None
    authorization: Authorization | None = None


class ServiceMonitorSpec(Strict):
    selector: Selector
    endpoints: Annotated[list[Scrape], Field(min_length=1)]


class PodMonitorSpec(Strict):
    selector: Selector
    podMetricsEndpoints: Annotated[list[Scrape], Field(min_length=1)]
    podTargetLabels: list[str] = []


class Rule(Strict):
    alert: str
    expr: str
    for_: Annotated[Duration | None, Field(alias="for")] = None
    labels: dict[str, str]
    annotations: dict[str, str]


class RuleGroup(Strict):
    name: str
    rules: Annotated[list[Rule], Field(min_length=1)]


class PrometheusRuleSpec(Strict):
    groups: Annotated[list[RuleGroup], Field(min_length=1)]


class CertificateRef(Strict):
    name: str


class Tls(Strict):
    mode: Literal["Terminate", "Passthrough"]
    certificateRefs: Annotated[list[CertificateRef], Field(min_length=1)]


class RouteNamespaces(Strict):
    from_: Annotated[Literal["All", "Same", "Selector"], Field(alias="from")]


class AllowedRoutes(Strict):
    namespaces: RouteNamespaces


class Listener(Strict):
    name: str
    port: Port
    protocol: Literal["HTTP", "HTTPS", "TLS", "TCP", "UDP"]
    hostname: Hostname
    tls: Tls
    allowedRoutes: AllowedRoutes


class GatewaySpec(Strict):
    gatewayClassName: str
    listeners: Annotated[list[Listener], Field(min_length=1, max_length=64)]


class ParentRef(Strict):
    name: str
    sectionName: str


class BackendRef(Strict):
    name: str
    port: Port


class PathMatch(Strict):
    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: Annotated[str, Field(pattern="^/")]


class HttpMatch(Strict):
    path: PathMatch


class Timeouts(Strict):
    request: Duration
    backendRequest: Duration


class HttpRule(Strict):
    matches: Annotated[list[HttpMatch], Field(min_length=1)]
    timeouts: Timeouts
    backendRefs: Annotated[list[BackendRef], Field(min_length=1)]


class HttpRouteSpec(Strict):
    parentRefs: list[ParentRef]
    hostnames: list[Hostname]
    rules: Annotated[list[HttpRule], Field(min_length=1)]


class MethodMatch(Strict):
    type: Literal["Exact", "RegularExpression"]
    service: str
    method: str


class GrpcMatch(Strict):
    method: MethodMatch


class GrpcRule(Strict):
    matches: Annotated[list[GrpcMatch], Field(min_length=1)]
    backendRefs: Annotated[list[BackendRef], Field(min_length=1)]


class GrpcRouteSpec(Strict):
    parentRefs: list[ParentRef]
    hostnames: list[Hostname]
    rules: Annotated[list[GrpcRule], Field(min_length=1)]


class CustomObject(Strict):
    apiVersion: str
    kind: str
    metadata: dict[str, Any]  # checked as Kubernetes' own, for every object


class ServiceMonitor(CustomObject):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    spec: ServiceMonitorSpec


class PodMonitor(CustomObject):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    spec: PodMonitorSpec


class PrometheusRule(CustomObject):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    spec: PrometheusRuleSpec


class Gateway(CustomObject):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    spec: GatewaySpec


class HTTPRoute(CustomObject):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    spec: HttpRouteSpec


class GRPCRoute(CustomObject):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    spec: GrpcRouteSpec


MODELS: Final[dict[tuple[str, str], type[CustomObject]]] = {
    ("monitoring.coreos.com", "ServiceMonitor"): ServiceMonitor,
    ("monitoring.coreos.com", "PodMonitor"): PodMonitor,
    ("monitoring.coreos.com", "PrometheusRule"): PrometheusRule,
    ("gateway.networking.k8s.io", "Gateway"): Gateway,
    ("gateway.networking.k8s.io", "HTTPRoute"): HTTPRoute,
    ("gateway.networking.k8s.io", "GRPCRoute"): GRPCRoute,
}
