# sdonnx serve in a container; docs/server.md says how to run it, docs/many-machines.md how on a Ray cluster.
FROM python:3.13-slim AS build
RUN python -m venv /opt/sdonnx
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sdonnx sdonnx
COPY runtime runtime
COPY export export
COPY models models
ARG EXTRAS=cpu,serve
ARG ALSO=""
RUN /opt/sdonnx/bin/pip install --no-cache-dir ".[$EXTRAS]" $ALSO

FROM python:3.13-slim
RUN useradd --create-home --uid 1000 sdonnx && install --directory --owner sdonnx /images /models
COPY --from=build /opt/sdonnx /opt/sdonnx
ENV PATH=/opt/sdonnx/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/sdonnx
VOLUME ["/images"]
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
# Listens for other machines, so that it starts only with SDONNX_TOKEN.
ENTRYPOINT ["sdonnx", "serve", "--host", "0.0.0.0", "--output", "/images"]
