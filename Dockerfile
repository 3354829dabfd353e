# FleetFed's images, one target each: broker, gateway, device, helper, coordinator. See docs/containers.md.
#
#   docker build --target gateway -t fleetfed/gateway .
#
# Nothing here needs BuildKit. Pin the base by digest where images are released:
#   --build-arg BASE_IMAGE=debian:bookworm-slim@sha256:…
ARG BASE_IMAGE=debian:bookworm-slim

# --- broker: Debian's Mosquitto; its configuration is rendered by `fleetfed broker render` --------------------------------
FROM ${BASE_IMAGE} AS broker
# The account first, so that its number is the same in every build: mounted files belong to it.
RUN groupadd --system --gid 1883 mosquitto \
 && useradd --system --uid 1883 --gid 1883 --home-dir /var/lib/mosquitto --no-create-home --shell /usr/sbin/nologin mosquitto \
 && apt-get update \
 && apt-get install --yes --no-install-recommends mosquitto \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* /etc/mosquitto \
 && install -d -o mosquitto -g mosquitto -m 0700 /var/lib/fleetfed \
 && install -d -m 0755 /etc/fleetfed
USER 1883:1883
EXPOSE 8883
VOLUME ["/var/lib/fleetfed"]
# 22B3 is 8883: a probe that connected would leave a line about a broken handshake in the log.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 \
  CMD ["grep", "-qs", ":22B3 0\\{8,32\\}:0000 0A", "/proc/net/tcp", "/proc/net/tcp6"]
ENTRYPOINT ["mosquitto"]
CMD ["-c", "/etc/fleetfed/mosquitto.conf"]

# --- what runs Python ----------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
 && groupadd --system --gid 10001 fleetfed \
 && useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/fleetfed --no-create-home --shell /usr/sbin/nologin fleetfed \
 && install -d -o fleetfed -g fleetfed -m 0700 /var/lib/fleetfed \
 && install -d -m 0755 /etc/fleetfed
# The root may be read-only, and compiled files come with the image.
ENV PATH=/opt/fleetfed/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# --- what builds ---------------------------------------------------------------------------------------------------------
FROM runtime AS builder
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
 && rm -rf /var/lib/apt/lists/* /var/cache/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY deploy/requirements/build.txt /requirements/
RUN python3 -m venv /build && /build/bin/pip install --quiet --require-hashes --requirement /requirements/build.txt

FROM builder AS wheel
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY broker broker
COPY cloud_coordinator cloud_coordinator
COPY device device
COPY gateway gateway
COPY shared shared
RUN /build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .

# One environment per role: what its list of packages names, and of FleetFed what its role imports.
FROM builder AS gateway-environment
COPY deploy/requirements/gateway.txt deploy/requirements/assemble /requirements/
RUN sh /requirements/assemble packages gateway
COPY --from=wheel /wheels /wheels
RUN sh /requirements/assemble fleetfed fleetfed-gateway gateway shared

FROM builder AS helper-environment
COPY deploy/requirements/gateway.txt deploy/requirements/assemble /requirements/
RUN sh /requirements/assemble packages gateway
COPY --from=wheel /wheels /wheels
RUN sh /requirements/assemble fleetfed fleetfed-helper cloud_coordinator/__init__.py cloud_coordinator/helper shared

FROM builder AS device-environment
COPY deploy/requirements/device.txt deploy/requirements/assemble /requirements/
RUN sh /requirements/assemble packages device
COPY --from=wheel /wheels /wheels
RUN sh /requirements/assemble fleetfed fleetfed-device device shared

FROM builder AS coordinator-environment
COPY deploy/requirements/coordinator.txt deploy/requirements/assemble /requirements/
RUN sh /requirements/assemble packages coordinator
COPY --from=wheel /wheels /wheels
RUN sh /requirements/assemble fleetfed fleetfed broker cloud_coordinator shared

# --- gateway -------------------------------------------------------------------------------------------------------------
FROM runtime AS gateway
COPY --from=gateway-environment /opt/fleetfed /opt/fleetfed
USER 10001:10001
VOLUME ["/var/lib/fleetfed"]
EXPOSE 9465
# It starts Python, which takes seconds where the processor is slow or busy; the same below.
HEALTHCHECK --interval=30s --timeout=30s --start-period=30s --retries=3 \
  CMD ["fleetfed-gateway", "status", "--config", "/etc/fleetfed/gateway.toml", "--healthy"]
ENTRYPOINT ["fleetfed-gateway"]
CMD ["run", "--config", "/etc/fleetfed/gateway.toml"]

# --- device --------------------------------------------------------------------------------------------------------------
FROM runtime AS device
COPY --from=device-environment /opt/fleetfed /opt/fleetfed
USER 10001:10001
VOLUME ["/var/lib/fleetfed"]
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s --retries=3 \
  CMD ["fleetfed-device", "status", "--config", "/etc/fleetfed/device.toml", "--healthy"]
ENTRYPOINT ["fleetfed-device"]
CMD ["run", "--config", "/etc/fleetfed/device.toml"]

# --- helper --------------------------------------------------------------------------------------------------------------
FROM runtime AS helper
COPY --from=helper-environment /opt/fleetfed /opt/fleetfed
USER 10001:10001
VOLUME ["/var/lib/fleetfed"]
EXPOSE 9466
HEALTHCHECK --interval=30s --timeout=30s --start-period=30s --retries=3 \
  CMD ["fleetfed-helper", "status", "--config", "/etc/fleetfed/helper.toml", "--healthy"]
ENTRYPOINT ["fleetfed-helper"]
CMD ["run", "--config", "/etc/fleetfed/helper.toml"]

# --- coordinator: also the operator's commands ---------------------------------------------------------------------------
FROM runtime AS coordinator
COPY --from=coordinator-environment /opt/fleetfed /opt/fleetfed
USER 10001:10001
VOLUME ["/var/lib/fleetfed"]
EXPOSE 9464
HEALTHCHECK --interval=30s --timeout=30s --start-period=30s --retries=3 \
  CMD ["fleetfed", "coordinator", "status", "--config", "/etc/fleetfed/coordinator.toml", "--healthy"]
ENTRYPOINT ["fleetfed"]
CMD ["coordinator", "run", "--config", "/etc/fleetfed/coordinator.toml"]
