const {StableDiffusionApi, ControlNetApi} = require("stable-diffusion-api"), sharp = require("sharp");
const pixels = async image => (await image.removeAlpha().raw().toBuffer()).toString("base64");
(async () => {
  const api = new StableDiffusionApi({host: process.argv[2], port: +process.argv[3], defaultStepCount: 2});
  const size = {width: 64, height: 64, seed: 3, cfg_scale: 4, sampler_name: "DPM++ 2M"};
  const made = await api.txt2img({prompt: "a red circle", ...size});
  const again = await api.img2img({init_images: [made.image], prompt: "a circle", ...size});
  const info = await api.pngInfo(sharp(Buffer.from(made.response.data.images[0], "base64")).png());
  const extra = await api.extraSingle({image: made.image, upscaler_1: "Lanczos", upscaling_resize: 2});
  const batch = await api.extraBatch({images: [made.image], name_list: ["a"], upscaler_1: "Nearest"});
  const control = new ControlNetApi(api);
  const edges = await control.detect({controlnet_module: "canny", controlnet_input_images: [made.image]});
  await api.setOptions(await api.getOptions());
  const names = ["Samplers", "Upscalers", "SdModels", "Hypernetworks", "FaceRestorers", "RealesrganModels"];
  const lists = [await api.getPromptStyles(), await control.getModels()];
  for (const name of names) lists.push(await api[`get${name}`]());
  await api.refreshCheckpoints();
  const short = new StableDiffusionApi({host: process.argv[2], port: +process.argv[3], timeout: 300});
  const error = await short.txt2img({prompt: "a", ...size, steps: 200}).catch(error => error.code);
  console.log(JSON.stringify({made: await pixels(made.image), again: again.images.length, info: info.info, error,
    sizes: [(await extra.image.metadata()).width, (await batch.image.metadata()).width], edges: edges.images.length,
    lists: lists.map(Array.isArray), flags: await api.getCmdFlags(), progress: await api.getProgress(true)}));
})().catch(error => { console.error(error); process.exit(1); });
