declare module "gzip:*" {
  const base64: string;
  export default base64;
}
